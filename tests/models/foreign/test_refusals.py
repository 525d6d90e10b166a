"""What cannot be wrapped is refused in one line that names the module and says what to do."""

import math
import re
from collections.abc import Callable
from typing import Any

import norse.torch as norse
import pytest
import snntorch
import torch
from snntorch import surrogate as snn_surrogate
from spikingjelly.activation_based import functional, layer, neuron
from spikingjelly.activation_based import surrogate as sj_surrogate
from spikingjelly.activation_based.model.spike_dhs import save_v_LIFNode
from torch import Tensor, nn

from pipeline import unwrap, wrap
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.state import fresh_state

SJ = "spikingjelly.activation_based."


def with_layer(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), *modules)


def multi_step(*modules: nn.Module) -> nn.Sequential:
    """A neuron with step_mode "m" and other modules."""
    return nn.Sequential(neuron.IFNode(step_mode="m"), *modules)


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda _, __, spikes: spikes)
    return with_layer(nn.BatchNorm1d(4), module, neuron.IFNode())


def leaky(**changes: Any) -> nn.Module:
    return with_layer(snntorch.Leaky(**{"beta": 0.9, "init_hidden": True, **changes}))


def node(function: Any) -> nn.Module:
    return with_layer(neuron.IFNode(surrogate_function=function))


def cell(kind: type[nn.Module], parameters: Any) -> nn.Module:
    return with_layer(kind(parameters))


def number(value: float) -> Tensor:
    return torch.tensor(value)


class LearntSlope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return (self.slope * x).sigmoid()


class OwnLeaky(snntorch.Leaky):
    """A subclass, which may compute anything."""


class Bernoulli(torch.autograd.Function):
    """Stochastic spikes, with a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.bernoulli(x.sigmoid())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "Synaptic": (lambda: with_layer(snntorch.Synaptic(0.9, 0.8)), "1 (snntorch.Synaptic): .*Leaky"),
    "Alpha": (lambda: with_layer(snntorch.Alpha(0.9, 0.8)), "1 (snntorch.Alpha): .*Leaky"),
    "RLeaky": (
        lambda: with_layer(snntorch.RLeaky(0.9, linear_features=4)),
        "1 (snntorch.RLeaky): .*Leaky",
    ),
    "Lapicque": (lambda: with_layer(snntorch.Lapicque(0.9)), "1 (snntorch.Lapicque): .*Leaky"),
    "a subclass": (lambda: with_layer(OwnLeaky(0.9)), "1 (tests.OwnLeaky): .*replace it by Leaky"),
    "inhibition": (lambda: leaky(inhibition=True), "1 (snntorch.Leaky): inhibition must be False"),
    "learnt threshold": (lambda: leaky(learn_threshold=True), "threshold must not be learnt"),
    "vector beta": (lambda: leaky(beta=torch.rand(4)), "beta must be one number"),
    "learnt vector beta": (
        lambda: leaky(beta=torch.rand(4), learn_beta=True),
        "beta must be one number",
    ),
    "no reset": (lambda: leaky(reset_mechanism="none"), "reset_mechanism must be .*got .*'none'"),
    "undelayed subtract": (lambda: leaky(reset_delay=False), "got .*'subtract', reset_delay=False"),
    "state quantisation": (lambda: leaky(state_quant=torch.round), "state_quant must be False"),
    "graded spikes": (lambda: leaky(graded_spikes_factor=2.0), "graded_spikes_factor must be 1"),
    "learnt graded spikes": (
        lambda: leaky(learn_graded_spikes_factor=True),
        "graded_spikes_factor must not be learnt",
    ),
    "graded surrogate": (lambda: node(sj_surrogate.Sigmoid(spiking=False)), "graded spikes cannot"),
    "stochastic derivative": (
        lambda: leaky(spike_grad=snn_surrogate.SSO()),
        "surrogate must be deterministic; got SSO",
    ),
    "stochastic spikes": (lambda: node(Bernoulli.apply), "surrogate must be deterministic"),
    "Poisson": (lambda: node(sj_surrogate.PoissonPass()), "got PoissonPass"),
    "learnt surrogate": (lambda: node(LearntSlope()), "no learnt parameter; got LearntSlope"),
    "no derivative": (lambda: leaky(surrogate_disable=True), "have a derivative"),
    "v_reset above": (lambda: with_layer(neuron.IFNode(v_reset=1.5)), "v_threshold must be above"),
    "PSN": (lambda: multi_step(neuron.PSN(4)), "1 (spikingjelly.PSN): .*IFNode"),
    "sliding PSN": (lambda: multi_step(neuron.SlidingPSN(2)), "1 (spikingjelly.SlidingPSN)"),
    "recurrent container": (
        lambda: with_layer(layer.LinearRecurrentContainer(neuron.IFNode(), 4, 4)),
        "1 (spikingjelly.LinearRecurrentContainer)",
    ),
    "element-wise recurrent container": (
        lambda: with_layer(layer.ElementWiseRecurrentContainer(neuron.IFNode(), torch.add)),
        "1 (spikingjelly.ElementWiseRecurrentContainer)",
    ),
    "RecurrentSequential": (
        lambda: norse.RecurrentSequential(norse.LIFBoxCell()),
        "(norse.RecurrentSequential): .*Seq",
    ),
    "a neuron of the model zoo": (
        lambda: with_layer(save_v_LIFNode()),
        "1 (spikingjelly.save_v_LIFNode)",
    ),
    "SynapseFilter": (lambda: with_layer(layer.SynapseFilter()), "1 (spikingjelly.SynapseFilter)"),
    "a package's dropout over channels": (
        lambda: with_layer(layer.Dropout2d(0.5), neuron.IFNode()),
        "1 (spikingjelly.Dropout2d)",
    ),
    "norse over time": (lambda: with_layer(norse.LIF()), "1 (norse.LIF): .*LIFBoxCell"),
    "synaptic time constant": (
        lambda: with_layer(norse.LIFCell()),
        "1 (norse.LIFCell): dt tau_syn_inv must be 1.*got 0.2",
    ),
    "v_leak of a box": (
        lambda: cell(norse.LIFBoxCell, norse.LIFBoxParameters(v_leak=number(0.1))),
        "v_reset must be v_leak; got v_reset=0, v_leak=0.1",
    ),
    "v_leak of a LIF": (
        lambda: cell(
            norse.LIFCell, norse.LIFParameters(tau_syn_inv=number(1000.0), v_reset=number(-0.1))
        ),
        "v_reset must be v_leak; got v_reset=-0.1, v_leak=0",
    ),
    "learnt threshold of norse": (
        lambda: cell(norse.LIFBoxCell, norse.LIFBoxParameters(v_th=nn.Parameter(number(1.0)))),
        "v_th must not be learnt",
    ),
    "mixed step modes": (lambda: multi_step(neuron.IFNode()), "1 (spikingjelly.IFNode): .*'m'"),
    "a foreign neuron in all steps": (
        lambda: multi_step(snntorch.Leaky(0.9, init_hidden=True)),
        "1 (snntorch.Leaky): .*'m'",
    ),
    "a neuron in a batch of time steps": (
        lambda: layer.SeqToANNContainer(nn.Sequential(nn.Linear(5, 4), neuron.IFNode())),
        "0.1 (spikingjelly.IFNode): .*takes the time steps for samples",
    ),
    "hooks of a neuron": (
        lambda: hooked(neuron.IFNode()),
        "2 (spikingjelly.IFNode): is replaced and must have no hooks; remove them",
    ),
    "hooks of a batch norm": (
        lambda: hooked(nn.BatchNorm1d(4)),
        "2 (torch.BatchNorm1d): .* no hooks",
    ),
    "another release": (
        lambda: with_layer(type("LIFNode", (nn.Module,), {"__module__": f"{SJ}neuron"})()),
        f"1 (spikingjelly.LIFNode): this class, {SJ}neuron.LIFNode, cannot .* of release 2.0",
    ),
    "no neurons": (lambda: with_layer(nn.ReLU()), "must have neurons of spikingjelly, snntorch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_mapped_is_refused_by_name(name: str) -> None:
    build, problem = REFUSED[name]
    network = build()
    state = torch.get_rng_state()
    with pytest.raises(
        ValueError, match="^wrap: .*" + problem.replace("(", r"\(").replace(")", r"\)")
    ) as error:
        wrap(network)
    assert "\n" not in str(error.value) and torch.equal(torch.get_rng_state(), state)


def test_arguments() -> None:
    network: Any = leaky()
    for changes, problem in (
        (
            {"output": "mem"},
            "output must be 'spikes', 'membrane' or an index >= 0; got output='mem'",
        ),
        ({"output": -1}, "got output=-1"),
        ({"norm": "time"}, "norm must be 'as_is' or 'step'; got norm='time'"),
        ({"network": 3}, "network must be a torch.nn.Module; got int"),
    ):
        with pytest.raises(
            ValueError,
            match="wrap: " + re.escape(problem) if "wrap" in problem else re.escape(problem),
        ):
            wrap(**{"network": network, **changes})
    with pytest.raises(ValueError, match="unwrap: needs the network that wrap returned; got Seq"):
        unwrap(network)


class Block(nn.Module):
    """A block of a user, whose input has no time axis in a SeqToANNContainer."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.fc = nn.BatchNorm1d(5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(x))


def test_a_block_without_a_time_axis_has_no_statistics_of_each_step_and_no_trace() -> None:
    network: Any = multi_step(layer.SeqToANNContainer(Block()))
    with pytest.raises(
        ValueError, match=r"^wrap: norm='step' .* got 1\.0\.bn [(]torch.BatchNorm1d"
    ):
        wrap(network, norm="step")
    x_TB = torch.randn(3, 2, 5)
    wrapped = wrap(network)
    with fresh_state(wrapped):
        assert torch.equal(wrapped(x_TB), network(x_TB))
    with pytest.raises(
        ValueError, match=r"must not mix time steps; got BatchNorm1d at network\.1\.0"
    ):
        SLTT().attach(wrapped)
    network[1][0].bn = nn.Identity()
    with pytest.raises(ValueError, match=r"those of pipeline.spiking.synapse.*network\.1\.0\.fc"):
        OTTT().attach(wrap(network))


# ------------------------------------------------------------------------------------ in a forward


class Own(nn.Module):
    """A network of snnTorch or norse, with a forward of its own."""

    def __init__(self, lif: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.fc, self.lif, self.own_forward = nn.Linear(5, 4), lif, forward
        self.last: Any = None

    def forward(self, x: Tensor) -> Any:
        return self.own_forward(self, x)


class Passing(Own):
    def forward(self, x: Tensor, state: Any = None) -> Any:
        return self.own_forward(self, x, state)


def loop(network: Any, x: Tensor) -> Tensor:
    mem, s = network.lif.init_leaky(), x
    for _ in range(3):
        s, mem = network.lif(network.fc(x), mem)
    return s


def twice(network: Any, x: Tensor) -> Tensor:
    return network.lif(network.lif(network.fc(x))[0])[0]


def resets(network: Any, x: Tensor) -> Tensor:
    return network.lif(network.fc(x), network.lif.init_leaky())[0]


def resets_norse(network: Any, x: Tensor) -> Tensor:
    return network.lif(network.fc(x))[0]


def changes(network: Any, x: Tensor) -> Tensor:
    s, mem = network.lif(network.fc(x))
    return s + 0.5 * mem


def reads(network: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    s, state = network.lif(network.fc(x), state)
    return s * state.v, state


def keeps(network: Any, x: Tensor) -> Tensor:
    s, network.last = network.lif(network.fc(x), network.last)
    return s


def feeds_back(network: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    s, own = network.lif(network.fc(x) + (0 if state is None else state[0]), state and state[1])
    return s, (s, own)


def only_output(network: Any, x: Tensor, state: Any) -> Tensor:
    return network.lif(network.fc(x), state)[0]


def mean(network: Any, x: Tensor) -> Tensor:
    return network.lif(network.fc(x))[0].mean()


def own_leaky(forward: Callable[..., Any]) -> nn.Module:
    return Own(snntorch.Leaky(0.9), forward)


CHANGED = "changes or resets the state of lif"
ONLY_PASSED = "only pass on the state of lif.*output='membrane'"

IN_FORWARD: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "a loop": (
        lambda: own_leaky(loop),
        "spikes",
        "another run of lif; take the loop over time out",
    ),
    "a neuron at two places": (
        lambda: own_leaky(twice),
        "spikes",
        "another run of lif; .*neuron of its own",
    ),
    "a node at two places": (
        lambda: multi_step(*[neuron.IFNode(step_mode="m")] * 2),
        "spikes",
        "another run of 1;",
    ),
    "a reset": (lambda: own_leaky(resets), "spikes", CHANGED),
    "a reset of norse": (lambda: Own(norse.LIFBoxCell(), resets_norse), "spikes", CHANGED),
    "arithmetic on a state": (lambda: own_leaky(changes), "spikes", ONLY_PASSED),
    "a value of a state": (lambda: Passing(norse.LIFBoxCell(), reads), "spikes", ONLY_PASSED),
    "a state that is kept": (lambda: Own(norse.LIFBoxCell(), keeps), "spikes", CHANGED),
    "feedback": (
        lambda: Passing(norse.LIFBoxCell(), feeds_back),
        "spikes",
        "pass on only states of neurons.*a tensor",
    ),
    "a state that is not returned": (
        lambda: Passing(norse.LIFBoxCell(), only_output),
        "spikes",
        "return its output and then a state",
    ),
    "a mean over time": (
        lambda: own_leaky(mean),
        "spikes",
        r"one output per time step.*\[3, 2, K\]",
    ),
    "an index": (lambda: own_leaky(mean), 0, "a tensor as output=0; got Tensor"),
    "no tensor": (lambda: leaky(output=True), 2, "a tensor as output=2; got a tuple of 2"),
}


@pytest.mark.parametrize("name", IN_FORWARD)
def test_a_forward_that_cannot_be_wrapped_is_refused(name: str) -> None:
    build, output, problem = IN_FORWARD[name]
    wrapped = wrap(build(), output)

    def run_two_batches() -> None:
        for _ in range(2):
            with fresh_state(wrapped):
                wrapped(torch.randn(3, 2, 5))

    with pytest.raises(ValueError, match="^wrap: .*" + problem) as error:
        run_two_batches()
    assert "\n" not in str(error.value)


def test_a_layer_whose_input_has_no_time_axis_gets_no_trace() -> None:
    """A flattened input would be taken for time steps."""

    class Flattening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif, self.fc = neuron.LIFNode(step_mode="m"), nn.Linear(5, 4)

        def forward(self, x_TB: Tensor) -> Tensor:
            y = self.fc(self.lif(x_TB).flatten(0, 1).unsqueeze(1))
            return y.view(*x_TB.shape[:2], 4)

    wrapped = wrap(Flattening())
    rule = OTTT(first="traced")
    rule.attach(wrapped)
    with pytest.raises(ValueError, match=r"input of fc must be time first.*\(6, 1, 5\) at T=1"):
        list(rule.loss_terms(wrapped, torch.randn(3, 6, 5), torch.sum))


def test_states_are_cleared_by_fresh_state_alone() -> None:
    """The package's reset of a whole network, outside of it, does nothing."""
    wrapped = wrap(with_layer(neuron.IFNode()))
    functional.reset_net(wrapped)
    rule = BPTT()
    rule.attach(wrapped)
    x_TB = torch.randn(3, 2, 5)
    losses = [float(next(rule.loss_terms(wrapped, x_TB, torch.sum)).loss) for _ in range(2)]
    assert losses[0] == losses[1] and not math.isnan(losses[0])
