"""Wrapped networks against their packages: outputs, gradients, spikes, rules, and the original."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import snntorch
import torch
from norse.torch import IAFCell, LIFBoxCell, LIFBoxParameters, LIFCell, LIFParameters
from norse.torch.functional.reset import reset_subtract
from snntorch import surrogate as snn_surrogate
from spikingjelly.activation_based import functional, layer, neuron
from spikingjelly.activation_based import surrogate as sj_surrogate
from torch import Tensor, nn

from pipeline import unwrap, wrap
from pipeline.measure.check import check
from pipeline.rules.base import Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.hlop import HLOP
from pipeline.rules.opzo import OPZO
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.dropout import Dropout
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.state import fresh_state
from pipeline.spiking.synapse import Conv2d, Linear
from tests.helpers.foreign import (
    CASES,
    CLASSES,
    POOLED,
    SEW,
    SPIKFORMER,
    TUTORIAL,
    Case,
    pooled,
    recorded_spikes,
    scaled,
)

STEPS, BATCH = 4, 3
Grads = dict[str, Tensor]


def loss_fn(logits_BK: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits_BK.double(), torch.arange(len(logits_BK)) % CLASSES)


def mean_loss(logits_TBK: Tensor) -> Tensor:
    return torch.stack([loss_fn(logits_BK) for logits_BK in logits_TBK]).mean()


def gradients(network: nn.Module) -> Grads:
    """The gradients by parameter name, which are then cleared."""
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    return grads


def learnt(rule: Rule, wrapped: nn.Module, x_TB: Tensor) -> float:
    """The loss of one batch under an attached rule, after its backward."""
    total = 0.0
    for term in rule.loss_terms(wrapped, x_TB, loss_fn):
        total += float(term.loss)
        if term.backward is not None:
            term.backward.backward()
    rule.end_of_batch()
    return total


def assert_close(ours: Grads, theirs: Grads, tolerance: float) -> None:
    assert ours.keys() == theirs.keys() and theirs
    for name, theirs_of in theirs.items():
        difference = float((ours[name] - theirs_of).norm() / theirs_of.norm())
        assert difference <= tolerance, (name, difference)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_are_those_of_the_package(case: Case) -> None:
    network, x_TB = case.network(), case.input(steps=STEPS, batch=BATCH)
    wrapped = wrap(network)
    spikes = recorded_spikes(network)
    y_TBK = case.original(network, x_TB)
    mean_loss(y_TBK).backward()
    theirs = gradients(network)
    rates = {name: float(torch.stack(each).double().mean()) for name, each in spikes.items()}
    assert all(0.01 <= rate <= 0.99 for rate in rates.values()), rates

    network.zero_grad()
    rule = BPTT()
    rule.attach(wrapped)
    with fresh_state(wrapped):
        assert (wrapped(x_TB) - y_TBK).abs().max() <= case.tolerances[0]
    learnt(rule, wrapped, x_TB)
    assert_close(gradients(network), theirs, case.tolerances[1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_fp32_at_most_one_spike_in_100000_differs(case: Case) -> None:
    network = case.network(torch.float32)
    x_TB = case.input(steps=STEPS, batch=16, dtype=torch.float32)
    wrapped = wrap(network)
    theirs = recorded_spikes(network)
    with torch.no_grad():
        case.original(network, x_TB)
    ours = recorded_spikes(wrapped)
    with torch.no_grad(), fresh_state(wrapped):
        wrapped(x_TB)
    assert ours.keys() == theirs.keys()
    pairs = [(torch.stack(ours[name]), torch.stack(theirs[name])) for name in theirs]
    differing = sum(int((a != b).sum()) for a, b in pairs)
    assert differing <= 1e-5 * sum(a.numel() for a, _ in pairs)


# ------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gradient_of_sltt_is_that_of_the_package_with_detached_states(case: Case) -> None:
    network, x_TB = case.network(), case.input(steps=STEPS, batch=BATCH)
    case.original_steps(network, x_TB, loss_fn)
    theirs = gradients(network)
    wrapped = wrap(network, norm="step")
    rule = SLTT()
    rule.attach(wrapped)
    learnt(rule, wrapped, x_TB)
    assert_close(gradients(network), theirs, case.tolerances[1])


RULES: dict[str, Callable[[], Rule]] = {
    "BPTT": BPTT,
    "BPTT-recompute": lambda: BPTT(recompute=True),
    "SLTT": SLTT,
    "SLTT-1": lambda: SLTT(k=1),
    "OTTT": OTTT,
    "OPZO": lambda: OPZO("random"),
}


# A large network, which has batch norm, learns for seconds: the full tier has it under BPTT.
TRAINED = [
    pytest.param(
        *(case, rule),
        marks=[pytest.mark.full] if case.has_batch_norm and "BPTT" in rule else [],
    )
    for case in (*CASES, POOLED)
    for rule in RULES
    if not (case.has_batch_norm and rule == "BPTT-recompute")
]


@pytest.mark.parametrize(("case", "rule_name"), TRAINED, ids=str)
def test_the_loss_falls_in_a_plain_loop(case: Case, rule_name: str) -> None:
    network = case.network(torch.float32)
    x_TB = case.input(steps=STEPS, batch=BATCH, dtype=torch.float32)
    wrapped = wrap(network, norm="step")
    rule = RULES[rule_name]()
    if case.has_batch_norm and rule_name in ("OTTT", "OPZO"):
        with pytest.raises(ValueError, match="a trace cannot pass batch norm"):
            rule.attach(wrapped)
        return
    rule.attach(wrapped)
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=3e-3)
    losses = []
    for _ in range(4 if case.has_batch_norm else 8):
        losses.append(learnt(rule, wrapped, x_TB))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("case", [TUTORIAL, POOLED], ids=str)
def test_under_ottt_the_last_synapse_has_the_gradient_of_bptt(case: Case) -> None:
    """Where the reset subtracts and is detached, for a synapse before the last neuron."""
    network, x_TB = case.network(), case.input(steps=STEPS, batch=BATCH)
    if case is POOLED:
        del network[-1]
    found = []
    for rule in (BPTT(), OTTT()):
        wrapped = wrap(network)
        keys = wrapped.state_dict().keys()
        rule.attach(wrapped)
        assert wrapped.state_dict().keys() == keys
        learnt(rule, wrapped, x_TB)
        *_, (name, grad) = ((n, g) for n, g in gradients(network).items() if g.dim() > 1)
        found.append({name: grad})
    assert_close(found[1], found[0], case.tolerances[1])


def test_seams_are_the_same_in_all_time_steps_at_once_and_one_by_one() -> None:
    """Also inside a container, whose layers then get the time axis, and in one dimension."""
    grads = []
    for step_mode in ("m", "s"):
        torch.manual_seed(0)
        wrapped = wrap(pooled(step_mode).double())
        rule = OTTT(first="traced")
        rule.attach(wrapped)
        assert sum(isinstance(module, (Conv2d, Linear)) for module in wrapped.modules()) == 3
        learnt(rule, wrapped, POOLED.input(steps=STEPS, batch=BATCH))
        grads.append(gradients(wrapped))
    assert_close(grads[0], grads[1], 1e-12)


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_a_convolution_in_one_dimension_has_the_seams_of_one_in_two(step_mode: str) -> None:
    grads, x_TB = [], torch.randn(STEPS, BATCH, 1, 64, dtype=torch.float64) * 2
    for kind in (nn.Conv1d, nn.Conv2d):
        torch.manual_seed(0)
        is_flat = kind is nn.Conv1d
        size = 5 if is_flat else (1, 5)
        network: Any = pooled(step_mode, first=kind(1, 8, size, padding=2 if is_flat else (0, 2)))
        if not is_flat:
            network[0][0][1].kernel_size = network[0][0][1].stride = (1, 4)
        wrapped = wrap(network.double())
        rule = OTTT(first="traced")
        rule.attach(wrapped)
        learnt(rule, wrapped, x_TB if is_flat else x_TB.unsqueeze(3))
        grads.append({name: grad.flatten() for name, grad in gradients(wrapped).items()})
    assert_close(grads[0], grads[1], 1e-12)


def small_norm(step_mode: str) -> nn.Sequential:
    network = nn.Sequential(
        layer.Linear(6, 8), layer.BatchNorm1d(8), neuron.IFNode(), layer.Linear(8, 4)
    )
    functional.set_step_mode(network, step_mode)
    return network.double()


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (partial(small_norm, "m"), (6,)),
        (partial(small_norm, "s"), (6,)),
        (SPIKFORMER.network, SPIKFORMER.shape),
    ],
)
def test_hlop_keeps_what_a_task_has_learnt(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    """Its batch norm is frozen after the first task, and its projection leaves the old inputs."""
    wrapped: Any = wrap(build(), norm="step")
    layers = [m for m in wrapped.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    rule: Any = HLOP(SLTT(), rows=((2,) * len(layers),), learning_rate=1e-3)
    rule.attach(wrapped)
    x_TB = torch.randn(STEPS, BATCH, *shape, dtype=torch.float64)
    learnt(rule, wrapped, x_TB)
    rule.start_task(wrapped, 1)
    frozen = [module.frozen for module in wrapped.modules() if isinstance(module, BatchNorm)]
    wrapped.zero_grad()
    learnt(rule, wrapped, x_TB)
    grad = layers[0].weight.grad
    assert all(frozen) and frozen and grad is not None and grad.norm() > 0
    old, grad = rule.subspaces[0].old, grad.flatten(1)
    assert (grad @ old.T).norm() < 1e-8 * grad.norm()


def test_batch_norm_over_time_is_refused_in_slices_with_the_way_out() -> None:
    wrapped = wrap(SEW.network(), norm="as_is")
    BPTT().attach(wrapped)
    with pytest.raises(ValueError, match=r"norm='step' in wrap.*got over='time' at network\.bn1"):
        SLTT().attach(wrap(SEW.network()))


def test_norm_step_is_the_original_one_time_step_at_a_time() -> None:
    network, x_TB = SPIKFORMER.network(), SPIKFORMER.input(steps=2, batch=BATCH)
    ours = copy.deepcopy(network)
    SPIKFORMER.reset(network)
    y_TBK = torch.cat([network(x_1B) for x_1B in x_TB.split(1)])
    wrapped = wrap(ours, norm="step")
    with fresh_state(wrapped):
        assert (wrapped(x_TB) - y_TBK).abs().max() < 1e-12
    theirs = network.state_dict()
    assert wrapped.network.state_dict().keys() == theirs.keys()
    for name, buffer in ours.named_buffers():
        assert torch.allclose(buffer, theirs[name], rtol=1e-12), name


# ----------------------------------------------------------------------------------------- neurons


def layered(make: Callable[[], nn.Module], *, step_mode: str = "s") -> Any:
    torch.manual_seed(0)
    network = nn.Sequential(layer.Linear(5, 30), make(), layer.Linear(30, 4))
    functional.set_step_mode(network, step_mode)
    return network.double()


class Stateful(nn.Module):
    """Passes the states of its neurons from call to call, as snnTorch and norse users write it."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 30), nn.Linear(30, 6)
        self.first, self.second = make(), make()

    def forward(self, x: Tensor, one: Any = None, two: Any = None) -> tuple[Tensor, Any, Any]:
        s, one = self.first(self.fc1(x.double()), one)
        s, two = self.second(self.fc2(s.double()), two)
        return s, one, two


def run_steps(network: nn.Module, x_TB: Tensor) -> tuple[Tensor, Tensor | None]:
    """The spikes, and the second element of the output if it is a membrane, of all time steps."""
    outputs, membranes, states = [], [], ()
    for x_B in x_TB:
        y = network(x_B, *states)
        if isinstance(network, Stateful):
            y, *states = y
            membranes.append(states[-1][0] if isinstance(states[-1], tuple) else states[-1])
        outputs.append(y.double())
    return torch.stack(outputs), torch.stack(membranes) if membranes else None


SPIKINGJELLY: tuple[tuple[type, dict[str, Any]], ...] = (
    (neuron.IFNode, {}),
    (neuron.IFNode, {"v_reset": None, "detach_reset": True, "v_threshold": 0.8}),
    (neuron.IFNode, {"v_reset": 0.25}),
    (neuron.LIFNode, {"tau": 1.7}),
    (neuron.LIFNode, {"v_reset": -0.3, "surrogate_function": sj_surrogate.Erf()}),
    (neuron.LIFNode, {"v_reset": 0.25, "decay_input": False, "detach_reset": True}),
    (neuron.LIFNode, {"v_reset": None, "surrogate_function": sj_surrogate.PiecewiseQuadratic()}),
    (neuron.ParametricLIFNode, {"detach_reset": True}),
    (neuron.ParametricLIFNode, {"v_reset": -0.3, "decay_input": False}),
    (neuron.ParametricLIFNode, {"v_reset": None, "init_tau": 1.5}),
)


@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize(("node", "keywords"), SPIKINGJELLY)
def test_nodes_of_spikingjelly(node: Any, keywords: dict[str, Any], step_mode: str) -> None:
    network = layered(lambda: node(**keywords), step_mode=step_mode)
    x_TB = torch.randn(6, 4, 5, dtype=torch.float64) * 3
    y_TBK = network(x_TB) if step_mode == "m" else run_steps(network, x_TB)[0]
    y_TBK.square().sum().backward()
    theirs = gradients(network)
    wrapped = wrap(network)
    with fresh_state(wrapped):
        ours_TBK = wrapped(x_TB)
    ours_TBK.square().sum().backward()
    assert (ours_TBK - y_TBK).abs().max() < 1e-12
    # w has no dimension; the wrapped network learns a tensor of one number in the same memory.
    own = {name.removeprefix("network."): grad for name, grad in gradients(wrapped).items()}
    own = {
        name.replace(".lif.parameter", ".w"): grad.view_as(
            theirs[name.replace(".lif.parameter", ".w")]
        )
        for name, grad in own.items()
    }
    assert_close(own, theirs, 1e-10)


def test_containers_of_spikingjelly() -> None:
    """Those that loop over time have batch norm of each step, the others of all steps."""
    torch.manual_seed(0)
    network = nn.Sequential(
        layer.MultiStepContainer(nn.Linear(5, 30, bias=False), nn.BatchNorm1d(30), neuron.IFNode()),
        layer.StepModeContainer(False, "m", nn.Linear(30, 30, bias=False), nn.BatchNorm1d(30)),
        layer.StepModeContainer(True, "m", neuron.ParametricLIFNode(v_reset=None)),
        layer.SeqToANNContainer(nn.Sequential(nn.Linear(30, 4))),
    ).double()
    x_TB = torch.randn(6, 4, 5, dtype=torch.float64)
    y_TBK = network(x_TB)
    y_TBK.square().sum().backward()
    theirs = gradients(network)
    del theirs["2.0.w"]
    for norm in ("as_is", "step"):
        wrapped = wrap(network, norm=norm)
        overs = [module.over for module in wrapped.modules() if isinstance(module, BatchNorm)]
        assert overs == ["step", "time" if norm == "as_is" else "step"]
    wrapped = wrap(network)
    with fresh_state(wrapped):
        ours_TBK = wrapped(x_TB)
    ours_TBK.square().sum().backward()
    assert (ours_TBK - y_TBK).abs().max() < 1e-12
    assert_close(gradients(network), theirs, 1e-10)
    membranes = wrap(network, "membrane", "step")
    with fresh_state(membranes):
        v_TB = membranes(x_TB)
    with fresh_state(membranes):
        assert torch.equal(torch.cat([membranes(x_1B) for x_1B in x_TB.split(1)]), v_TB)


LEAKY: tuple[dict[str, Any], ...] = (
    {},
    {"threshold": 0.7, "spike_grad": snn_surrogate.fast_sigmoid(10)},
    {"spike_grad": snn_surrogate.triangular()},
    {"reset_mechanism": "zero"},
    {"reset_mechanism": "zero", "reset_delay": False},
    {"learn_beta": True},
    {"learn_beta": True, "reset_mechanism": "zero"},
)


@pytest.mark.parametrize("output", ["spikes", "membrane", 2])
@pytest.mark.parametrize("keywords", LEAKY, ids=lambda keywords: " ".join(keywords) or "defaults")
def test_leaky_of_snntorch(keywords: dict[str, Any], output: Any) -> None:
    check_stateful(
        lambda: snntorch.Leaky(0.8, **keywords), output, gain=1.0, tolerances=(1e-10, 1e-6)
    )


def test_states_may_be_arguments_in_any_order_in_snntorch() -> None:
    """As in the documentation of `snntorch.Leaky`, where the spikes are arguments too."""

    class Documented(Stateful):
        def forward(  # type: ignore[override]
            self, x: Tensor, mem1: Any, spk1: Any, mem2: Any
        ) -> Any:
            spk1, mem1 = self.first(self.fc1(x), mem1)
            spk2, mem2 = self.second(self.fc2(spk1.double()), mem2)
            return mem1, spk1, mem2, spk2

    torch.manual_seed(0)
    network = scaled(Documented(lambda: snntorch.Leaky(0.8)).double(), 2.0)
    x_TB, states, outputs = torch.randn(6, 4, 5, dtype=torch.float64) * 3, (None,) * 3, []
    for x_B in x_TB:
        *states, y_B = network(x_B, *states)
        outputs.append(y_B)
    wrapped = wrap(network, output=3)
    with fresh_state(wrapped):
        assert torch.equal(wrapped(x_TB), torch.stack(outputs).double())
    assert 0.01 < torch.stack(outputs).mean() < 0.9


@pytest.mark.parametrize("output", ["spikes", "membrane", 1])
def test_an_optional_state_of_snntorch_is_none_at_the_first_step_alone(output: Any) -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif = nn.Linear(5, 4), snntorch.Leaky(0.8)

        def forward(self, x: Tensor, mem: Any = None) -> Any:
            if mem is None:
                x, mem = -x, self.lif.init_leaky()
            return self.lif(self.fc(x).double(), mem)

    torch.manual_seed(0)
    network = scaled(Lazy().double(), 3.0)
    x_TB, mem, outputs = torch.randn(6, 4, 5, dtype=torch.float64), None, []
    for x_B in x_TB:
        s_B, mem = network(x_B, mem)
        outputs.append(s_B if output == "spikes" else mem)
    wrapped = wrap(network, output)
    for _ in range(2):
        with fresh_state(wrapped):
            assert (wrapped(x_TB) - torch.stack(outputs)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", [layer.Dropout, Dropout])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_dropout_has_one_mask_for_all_time_steps(step_mode: str, kind: Any) -> None:
    """SpikingJelly's, and ours in a network that is called once per time step."""
    network = nn.Sequential(neuron.IFNode(), kind(0.5))
    functional.set_step_mode(network, step_mode)
    wrapped = wrap(network)
    with fresh_state(wrapped):
        y_TBN = wrapped(torch.full((3, 2, 400), 1.0))
    assert torch.equal(y_TBN[0], y_TBN[2]) and not torch.equal(y_TBN[0, 0], y_TBN[0, 1])
    assert 0.9 < y_TBN.mean() < 1.1 and y_TBN.unique().tolist() == [0.0, 2.0]
    wrapped.eval()
    with fresh_state(wrapped):
        assert wrapped(torch.full((3, 2, 400), 1.0)).unique().tolist() == [1.0]
    assert not unwrap(wrapped).training
    wrapped.train().get_submodule("network.1").eval()
    assert [module.training for module in unwrap(wrapped).children()] == [True, False]


def test_a_network_that_keeps_its_last_spikes_is_wrapped() -> None:
    class Recording(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            self.last = super().forward(input)
            return self.last

    network = Recording(nn.Linear(5, 4), snntorch.Leaky(0.8, init_hidden=True))
    network(torch.rand(2, 5))
    leaky: Any = network[1]
    leaky.reset_mem()
    wrapped = wrap(network)
    with fresh_state(wrapped):
        assert wrapped(torch.rand(3, 2, 5)).shape == (3, 2, 4)


def test_a_fault_inside_a_block_of_a_wrapped_network_is_found_there() -> None:
    class Block(nn.Module):
        def __init__(self, detaches: bool) -> None:
            super().__init__()
            self.fc, self.neuron = layer.Linear(16, 16), neuron.LIFNode(tau=1.5)
            self.detaches = detaches

        def forward(self, x: Tensor) -> Tensor:
            h = self.neuron(self.fc(x))
            return x + (h.detach() if self.detaches else h)

    torch.manual_seed(0)
    network = scaled(nn.Sequential(*(Block(at == 1) for at in range(3))), 6.0)
    functional.set_step_mode(network, "m")
    faults = [each for each in check(wrap(network), torch.rand(4, 5, 16)) if each.state == "fault"]
    assert ("gradients", "network.1") in [(each.question, each.module) for each in faults]


CELLS: dict[str, Callable[[], nn.Module]] = {
    "box": LIFBoxCell,
    "subtract": lambda: LIFBoxCell(
        LIFBoxParameters(reset_method=reset_subtract, v_th=torch.tensor(0.5))
    ),
    "leak": lambda: LIFBoxCell(
        LIFBoxParameters(
            v_leak=torch.tensor(0.2), v_reset=torch.tensor(0.2), method="circ", alpha=2.0
        )
    ),
    "integrate": IAFCell,
    "current": lambda: LIFCell(
        LIFParameters(tau_syn_inv=torch.tensor(1000.0), v_th=torch.tensor(0.5))
    ),
}


@pytest.mark.parametrize("output", ["spikes", "membrane"])
@pytest.mark.parametrize("cell", CELLS)
def test_cells_of_norse(cell: str, output: Any) -> None:
    check_stateful(CELLS[cell], output, gain=16.0, tolerances=(1e-12, 1e-10))


def check_stateful(
    make: Callable[[], nn.Module], output: Any, *, gain: float, tolerances: tuple[float, float]
) -> None:
    torch.manual_seed(0)
    network = scaled(Stateful(make), gain).double()
    x_TB = torch.randn(6, 4, 5, dtype=torch.float64) * 6
    spikes_TBK, membrane_TBK = run_steps(network, x_TB)
    theirs_TBK = spikes_TBK if output == "spikes" else membrane_TBK
    assert theirs_TBK is not None and 0.01 < spikes_TBK.mean() < 0.9
    theirs_TBK.sin().sum().backward()
    theirs = gradients(network)
    wrapped: Any = wrap(network, output=output)
    with fresh_state(wrapped):
        ours_TBK = wrapped(x_TB)
    ours_TBK.sin().sum().backward()
    assert (ours_TBK - theirs_TBK).abs().max() < tolerances[0]
    own = {name.removeprefix("network."): grad for name, grad in gradients(wrapped).items()}
    own = {name.replace(".lif.parameter", ".beta"): grad for name, grad in own.items()}
    assert_close(
        {name: grad.view_as(theirs[name]) for name, grad in own.items()}, theirs, tolerances[1]
    )
    # Slices are the same as all time steps at once, and leave no graph behind.
    with torch.no_grad(), fresh_state(wrapped):
        slices = torch.cat([wrapped(x_cB) for x_cB in x_TB.split(2)])
    assert torch.equal(slices, ours_TBK)
    copied = copy.deepcopy(wrapped)
    with torch.no_grad(), fresh_state(copied):
        assert torch.equal(copied(x_TB), ours_TBK)


# ------------------------------------------------------------------------------------- the original


@pytest.mark.parametrize("case", CASES, ids=str)
def test_unwrap_gives_the_trained_original(case: Case) -> None:
    network, x_TB = (
        case.network(torch.float32),
        case.input(steps=2, batch=BATCH, dtype=torch.float32),
    )
    before = {name: p.clone() for name, p in network.named_parameters()}
    kinds = [type(module) for module in network.modules()]
    wrapped = wrap(network, norm="step")
    assert list(map(id, wrapped.parameters())) == list(map(id, network.parameters()))
    wrapped.to(torch.float64)  # gives buffers other memory, as another device does
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    rule = SLTT()
    rule.attach(wrapped)
    learnt(rule, wrapped, x_TB.double())
    optimizer.step()
    with fresh_state(wrapped):
        wrapped.eval()
        y_TBK = wrapped(x_TB.double())
    with pytest.raises(ValueError, match=r"unwrap: .* a copy"):
        unwrap(copy.deepcopy(wrapped))
    original = unwrap(wrapped).eval()
    assert original is network and [type(module) for module in network.modules()] == kinds
    assert any(
        not torch.equal(p, before[name].to(p.dtype)) for name, p in network.named_parameters()
    )
    theirs_TBK = case.original(network, x_TB.double())
    assert (theirs_TBK - y_TBK).abs().max() <= case.tolerances[0]


def test_a_learnt_decay_is_one_number_in_the_memory_of_the_original() -> None:
    network = layered(neuron.ParametricLIFNode)
    wrapped: Any = wrap(network)
    with torch.no_grad():
        wrapped.network[1].lif.parameter.fill_(0.5)
    assert network[1].w.item() == 0.5 and all(p.dim() for p in wrapped.parameters())
    wrapped.network[1].lif.parameter.data = torch.tensor(
        [0.25], dtype=torch.float64
    )  # as ZeRO does
    assert unwrap(wrapped) is network and network[1].w.item() == 0.25


def test_the_original_may_have_run_and_runs_on() -> None:
    """A graph in the package's state is not copied."""
    network = layered(neuron.LIFNode, step_mode="m")
    x_TB = torch.randn(3, 4, 5, dtype=torch.float64)
    y_TBK = network(x_TB)
    wrap(network)
    functional.reset_net(network)
    assert torch.equal(network(x_TB), y_TBK)
