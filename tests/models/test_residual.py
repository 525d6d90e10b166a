import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.models.residual import (
    ALPHA,
    BlockFactory,
    GroupMean,
    Layer,
    Repeat,
    Rescaled,
)
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.rate import RateIF
from pipeline.spiking.state import fresh_state
from pipeline.spiking.synapse import Conv2d
from tests.helpers.families import lively, spike
from tests.helpers.rule_networks import outputs, refusals

FFN = [Layer(4, 12, bias=True), Layer(12, 4, bias=True)]
DOWN = [Layer(4, 8, 3, 2), Layer(8, 8, 3)]


def blocks(shortcut, norm="batch", **choices) -> BlockFactory:
    return BlockFactory(shortcut=shortcut, norm=norm, neuron=LIF(0.5), **choices)


def norm(module: BatchNorm, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias)


def conv(module: Conv2d, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    return F.conv2d(x, module.weight, module.bias, stride, module.weight.shape[-1] // 2)


def layers(model: nn.Module) -> list[tuple[Conv2d, BatchNorm]]:
    """Synapses with their norms, in order of registration: those of a branch before those of its
    shortcut.
    """
    found = [module for module in model.modules() if isinstance(module, (Conv2d, BatchNorm))]
    return list(zip(found[::2], found[1::2], strict=True))  # type: ignore[arg-type]


def by_hand(shortcut: str, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The table at the head of residual.py, written out for two layers that halve the image, at one
    time step.
    """
    (c1, n1), (c2, n2), (cs, ns) = layers(model)[:3]
    if shortcut == "membrane":
        return norm(n2, conv(c2, spike(norm(n1, conv(c1, spike(x), 2))))) + norm(ns, conv(cs, x, 2))
    if shortcut == "post_activation":
        return spike(norm(n2, conv(c2, spike(norm(n1, conv(c1, x, 2))))) + norm(ns, conv(cs, x, 2)))
    if shortcut == "sew":
        return spike(norm(n2, conv(c2, spike(norm(n1, conv(c1, x, 2)))))) + spike(
            norm(ns, conv(cs, x, 2))
        )
    (c1, n1), (cs, ns), (c2, n2) = layers(model)  # a shortcut for each layer
    pooled = norm(ns, conv(cs, F.avg_pool2d(x, 2)))
    if shortcut == "multiple":
        h = norm(n1, conv(c1, spike(x), 2)) + pooled
        return norm(n2, conv(c2, spike(h))) + h
    h = spike(norm(n1, conv(c1, x, 2))) + spike(pooled)
    return spike(norm(n2, conv(c2, h))) + h


@pytest.mark.parametrize(
    "shortcut", ["post_activation", "sew", "sew_multiple", "membrane", "multiple"]
)
def test_orders(shortcut):
    model = lively(blocks(shortcut).residual(DOWN)).double().eval()
    x_BCHW = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    x_BCHW = x_BCHW if shortcut in ("membrane", "multiple") else spike(x_BCHW)
    got = outputs(model, x_BCHW[None])[0]
    assert got.std() > 0
    assert (got - by_hand(shortcut, model, x_BCHW)).abs().max() < 1e-12


@pytest.mark.parametrize("shortcut", ["sew", "membrane"])
def test_pooled_projection(shortcut):
    model = lively(blocks(shortcut).residual(DOWN, pooled=True)).double().eval()
    x_BCHW = spike(torch.randn(3, 4, 8, 8, dtype=torch.float64))
    _, (_, last), (cs, ns) = layers(model)
    assert cs.stride == (1, 1)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, -1.0)
    projected = norm(ns, conv(cs, F.avg_pool2d(x_BCHW, 2)))
    expected = spike(projected) if shortcut == "sew" else projected - 1
    assert (outputs(model, x_BCHW[None])[0] - expected).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("shortcut", "kind"), [("multiple", "batch"), ("multiple", "sws"), ("sew_multiple", "batch")]
)
def test_a_stream_passes_silent_layers_whole(shortcut, kind):
    """With the branches of a widening and narrowing pair at zero the block is the identity, and so
    is its gradient.
    """
    model = blocks(shortcut, kind).residual(FFN).double()
    for module in model.modules():
        if isinstance(module, Conv2d):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    x_TB = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    g_TB = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    with fresh_state(model):
        y_TB = model(x_TB)
        y_TB.backward(g_TB)
    assert (y_TB - x_TB).abs().max() < 1e-15
    assert (x_TB.grad - g_TB).abs().max() < 1e-15  # type: ignore[operator]


def test_sws_divides_by_the_stream_and_projects_spikes():
    factory = blocks("membrane", "sws")
    made = [factory.residual(layers) for layers in (FFN, DOWN, [FFN[0], Layer(12, 8)])]
    assert [block.shortcut_of for block in made] == ["stream", "first", "first"]
    rescaled = [m for block in made for m in block.modules() if isinstance(m, Rescaled)]
    assert [m.beta**2 for m in rescaled[::2]] == pytest.approx([1, 1 + ALPHA**2, 1 + ALPHA**2])
    assert not any(isinstance(m, BatchNorm) for m in made[1].modules())
    assert all(m.weights == "standardized" for m in made[1].modules() if isinstance(m, Conv2d))


test_refuses = refusals(
    [
        (
            {"shortcut": "none"},
            r"shortcut must be 'post_activation', .* or 'multiple_all'; got shortcut='none'",
        ),
        ({"norm": "group"}, r"norm must be 'batch' or 'sws'; got norm='group'"),
        (
            {"norm": "sws"},
            r"norm='sws' needs shortcut='membrane' or 'multiple', .*got shortcut='sew'",
        ),
        (
            {"shortcut": "membrane", "norm": "sws", "neuron": LIF(scale_input=True)},
            r"BlockFactory: norm='sws' needs currents of unit variance",
        ),
    ],
    lambda **choices: BlockFactory(**({"shortcut": "sew", "neuron": LIF()} | choices)),
)


@pytest.mark.parametrize(("shortcut", "unit"), [("sew", 1), ("sew_multiple", 3)])
def test_what_the_stream_holds(shortcut, unit):
    """Spikes, their whole sums, or, behind a mean over groups of copies, multiples of one over
    their number.
    """
    x_TBCHW = (torch.rand(2, 3, 4, 5, 5) < 0.5).double()
    model = nn.Sequential(*(blocks(shortcut).residual(FFN) for _ in range(2)))
    model = lively(model).double().eval()
    y_TBCHW = outputs(model, x_TBCHW)
    assert torch.allclose(y_TBCHW * unit, (y_TBCHW * unit).round(), rtol=0, atol=1e-9)
    assert (unit == 1) == torch.equal(y_TBCHW, y_TBCHW.round())


def test_a_threshold_moves_the_reset_with_it_and_is_refused_where_there_is_none():
    def changed(prototype: nn.Module) -> nn.Module:
        return BlockFactory(shortcut="sew", neuron=prototype).neuron(threshold=0.5)

    neuron = changed(LIF(0.5, threshold=1.0, subtract=0.8))
    assert (neuron.threshold, neuron.subtract) == (0.5, 0.4)
    assert isinstance(changed(nn.ReLU()), nn.ReLU)
    message = r"neuron must be a plain LIF to get a threshold of 0\.5; got RateNeuron"
    with pytest.raises(ValueError, match=message):
        changed(RateIF())


# ------------------------------------------------------------------------------------------ stream


def test_group_mean_undoes_repeat():
    x = torch.randn(2, 3, 4, 5)
    repeated = Repeat(3)(x)
    assert repeated.shape == (2, 3, 12, 5)
    assert torch.allclose(GroupMean(3)(repeated), x)
    assert GroupMean(2)(torch.tensor([1.0, 2.0, 5.0, 8.0]).view(1, 1, 4)).flatten().tolist() == [
        3,
        5,
    ]


def test_expected_variance_of_a_stream():
    """Against streams drawn at random: branches of unit variance, weighted by ALPHA."""
    factory = blocks("multiple", "sws")
    x = torch.randn(1, 1, 2, 1_000_000, dtype=torch.float64)
    factory.residual([Layer(2, 2)])
    x = x + ALPHA * torch.randn_like(x)
    factory.residual([Layer(2, 8)])
    x = Repeat(4)(x)
    x = x + 5 * ALPHA * torch.randn_like(x)  # louder than expected, so that the division is seen
    factory.own_variance *= 25
    assert x.var().item() == pytest.approx(factory.shared_variance + factory.own_variance, rel=0.01)
    factory.residual([Layer(8, 2)])
    x = GroupMean(4)(x)
    x = x + ALPHA * torch.randn_like(x)
    assert x.var().item() == pytest.approx(factory.shared_variance + factory.own_variance, rel=0.01)
    factory.residual([Layer(2, 2, 3, 2)])
    assert (factory.shared_variance, factory.own_variance) == (1 + ALPHA**2, 0)
