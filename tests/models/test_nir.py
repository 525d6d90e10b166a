"""Out to NIR: SpikingJelly and snnTorch run the graph and spike at the same steps. And back."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import nir
import numpy as np
import pytest
import torch
from snntorch.import_nir import import_from_nir
from spikingjelly.activation_based import nir_exchange
from torch import Tensor, nn

from pipeline.models.convnet import convnet
from pipeline.models.mlp import mlp
from pipeline.models.ms_resnet import MSResNet
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.models.nir import DT, from_nir, to_nir
from pipeline.models.parts import Pool
from pipeline.models.preact_resnet import preact_resnet18_small
from pipeline.models.qkformer import QKFormer
from pipeline.models.sew_resnet import SEWResNet
from pipeline.spiking.neuron import IF, LIF, PLIF, named_neurons
from pipeline.spiking.norm import BatchNorm, batch_norms
from pipeline.spiking.state import fresh_state
from pipeline.spiking.synapse import Conv2d, Linear
from tests.helpers.rule_networks import outputs

STEPS, SAMPLES = 4, 100


def of_convolutions(neuron: nn.Module) -> nn.Module:
    """Pools with a border and without, norms behind both kinds of synapses, and a last neuron."""
    return nn.Sequential(
        Conv2d(3, 6, 3, 2, 1, bias=False),
        BatchNorm(6),
        neuron,
        Pool(nn.AvgPool2d(3, 2, 1)),
        convnet(10, in_channels=6, stages=((6,), (8,)), grid=2, neuron=neuron),
        BatchNorm(10),
        LIF(0.7, threshold=0.5, reset="zero"),
    )


NETWORKS = {
    "convolutions": of_convolutions,
    "MLP": lambda neuron: nn.Sequential(
        mlp(in_features=768, hidden=(32, 32), neuron=neuron), neuron
    ),
    "MS-ResNet": lambda neuron: MSResNet(
        blocks=(2, 1), classes=10, width=8, stem_stride=1, neuron=neuron
    ),
    "MS-ResNet, pooled": lambda neuron: MSResNet(
        blocks=(1, 1), classes=10, width=8, stem="three", pooled=True, dropout=0.2, neuron=neuron
    ),
}
NEURONS = {
    "LIF": lambda: LIF(0.5, threshold=0.6, reset="zero"),
    "scaled": lambda: LIF(0.75, threshold=0.4, reset="zero", scale_input=True),
    "PLIF": lambda: PLIF(0.8, threshold=0.6, comparison=">", reset="zero"),
    "IF": lambda: IF(threshold=0.9, reset="zero"),
}


def awake(network: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics of data, and weights under which all neurons fire."""
    torch.manual_seed(2)
    for module in network.modules():
        if isinstance(module, Linear):
            module.weight.data *= 3
    for norm in batch_norms(network):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, 0.0, 1.0)
    for _ in range(10):
        outputs(network.train(), images(seed=1)[:, :10])
    return network.eval()


def images(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(STEPS, SAMPLES, 3, 16, 16, generator=generator)


def step_by_step(network: Any, x_TB: Tensor) -> Tensor:
    """The outputs of a network of another package, whose states nirtorch passes on."""
    state, outputs = None, []
    with torch.no_grad():
        for x_B in x_TB:
            y_B, state = network(x_B, state)
            outputs.append(y_B)
    return torch.stack(outputs)


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_other_packages_run_the_same_network(network: str, neuron: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours, x_TBCHW = awake(NETWORKS[network](NEURONS[neuron]())), images()
    rates: dict[str, float] = {}

    def record(name: str, _: nn.Module, __: Any, s_TB: Tensor) -> None:
        rates[name] = s_TB.mean().item()

    for name, each in named_neurons(ours):
        each.register_forward_hook(partial(record, name))
    expected = outputs(ours, x_TBCHW)
    assert rates and all(0.01 < rate < 0.99 for rate in rates.values())

    nir.write(tmp_path / "network.nir", to_nir(ours, (3, 16, 16)))
    graph = nir.read(tmp_path / "network.nir")
    back = from_nir(graph)
    assert torch.allclose(outputs(back, x_TBCHW), expected, rtol=0, atol=1e-5)
    assert len(named_neurons(back)) == len(named_neurons(ours))
    # A spike at another step changes an output by far more.
    of_spikingjelly = step_by_step(nir_exchange.import_from_nir(graph), x_TBCHW)
    assert torch.allclose(of_spikingjelly, expected, rtol=0, atol=1e-4)
    if neuron != "IF":  # which snnTorch reads as a neuron with a beta of 0.9
        of_snntorch = step_by_step(import_from_nir(graph), x_TBCHW)
        assert torch.allclose(of_snntorch, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("comparison", [">=", ">"])
def test_a_membrane_at_the_threshold(comparison: Any) -> None:
    """The currents are 1/2 and the decay is 1/2, so the second u is the threshold of 3/4."""
    linear = Linear(1, 1)
    nn.init.ones_(linear.weight)
    nn.init.zeros_(linear.bias)
    ours = nn.Sequential(linear, LIF(0.5, threshold=0.75, comparison=comparison, reset="zero"))
    graph, x_TBC = to_nir(ours, (1,)), torch.full((3, 1, 1), 0.5)
    fires = [0, 1, 0] if comparison == ">=" else [0, 0, 1]
    packages = (
        [import_from_nir] if comparison == ">" else [import_from_nir, nir_exchange.import_from_nir]
    )
    assert outputs(from_nir(graph), x_TBC).flatten().tolist() == fires
    for package in packages:
        assert step_by_step(package(graph), x_TBC).flatten().tolist() == fires


class Twice(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(super().forward(input))


class Remembers(nn.Module):
    """Adds its output of the step before, as a network with feedback."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.last = Linear(4, 4), None

    def forward(self, x_TB: Tensor) -> Tensor:
        self.last = self.linear(x_TB if self.last is None else x_TB + self.last)
        return self.last


class BesideItsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = Conv2d(3, 3, 1), BatchNorm(3)

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        y_TBCHW = self.conv(x_TBCHW)
        return y_TBCHW + self.norm(y_TBCHW)


ZERO = LIF(reset="zero")


@pytest.mark.parametrize(
    ("network", "shape", "said"),
    [
        (
            convnet(),
            (3, 8, 8),
            r"stages\.0\.0\.neuron: neurons of NIR are .*; got LIF with reset 'subtract'",
        ),
        (
            SEWResNet(blocks=(1,), bottleneck=False, classes=2),
            (3, 32, 32),
            "has no max pool; train",
        ),
        (
            QKFormer(channels=16, depth=4, heads=1, classes=2, shortcut="membrane", neuron=ZERO),
            (3, 32, 32),
            "has no max pool",
        ),
        (
            nf_resnet18_small(width=4, neuron=ZERO),
            (3, 16, 16),
            "neurons of NIR have no factors; got {'gain'",
        ),
        (preact_resnet18_small(width=4), (3, 16, 16), "neurons of NIR are .*; got RateNeuron"),
        (
            preact_resnet18_small(width=4, head="linear", neuron=ZERO),
            (3, 16, 16),
            r"norm1: a batch norm must follow a synapse, as its only reader",
        ),
        (nn.Sequential(Conv2d(3, 2, 1), nn.GELU()), (3, 4, 4), "0: NIR has no equal of 'gelu'"),
        (Twice(Linear(4, 4), ZERO), (4,), "1: a neuron must run once in a time step"),
        (Remembers(), (4,), "NIR has no equal of 'add'"),
        (BesideItsNorm(), (3, 4, 4), "conv: NIR has no equal of 'add'"),
        (
            nn.Sequential(Pool(nn.AvgPool2d(2, ceil_mode=True)), ZERO, Conv2d(3, 2, 1)),
            (3, 5, 5),
            r"type mismatch: 0_pool\.output",
        ),
        (
            nn.Sequential(Conv2d(3, 2, 1), Pool(nn.AdaptiveAvgPool2d(2))),
            (3, 5, 5),
            "must have one size",
        ),
    ],
)
def test_what_nir_cannot_say_is_refused(network: nn.Module, shape: Any, said: str) -> None:
    with pytest.raises(ValueError, match=rf"(to_nir: |Type inference error: ).*{said}"):
        to_nir(network.eval(), shape)


def lif(**changed: Any) -> nir.LIF:
    values = {"tau": 2 * DT, "r": 2.0, "v_leak": 0.0, "v_threshold": 1.0, "v_reset": 0.0} | changed
    return nir.LIF(**{name: np.full(2, value) for name, value in values.items()})


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (lif(v_reset=-1.0), "'v_reset': [-1.0]"),
        (lif(v_leak=0.5), "'v_leak': [0.5]"),
        (lif(r=3.0), "'r': [3.0]"),
        (lif(v_threshold=[1.0, 2.0]), "'v_threshold': [1.0, 2.0]"),
        (nir.IF(np.ones(2), np.ones(2)), "'r': [1.0]"),
        (nir.Scale(np.ones(2)), "got Scale"),
    ],
)
def test_a_node_without_an_equal_is_named(node: nir.NIRNode, said: str) -> None:
    with pytest.raises(ValueError, match=rf"from_nir: (lif|if|scale): .*{re.escape(said)}"):
        from_nir(nir.NIRGraph.from_list(node))


def test_graphs_of_other_packages() -> None:
    """Names with dots, a layer without bias, and no loop."""
    nodes = {
        "input": nir.Input({"input": np.array([2])}),
        "fc.1": nir.Linear(np.eye(2, dtype=np.float32)),
        "fc.2": lif(),
        "output": nir.Output({"output": np.array([2])}),
    }
    edges = [("input", "fc.1"), ("fc.1", "fc.2"), ("fc.2", "output")]
    network = from_nir(nir.NIRGraph(nodes, edges))
    with fresh_state(network):
        assert network(torch.full((3, 1, 2), 0.7))[:, 0, 0].tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match=r"from_nir: the graph must have no loop; got \["):
        from_nir(nir.NIRGraph(nodes, [*edges, ("fc.2", "fc.1")]))
    two = nodes | {"output.2": nodes["output"]}
    with pytest.raises(ValueError, match=r"one input and one output; got \(1, 2\)"):
        from_nir(nir.NIRGraph(two, [*edges, ("fc.2", "output.2")]))
