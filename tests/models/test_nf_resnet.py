import math
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.models.nf_resnet import (
    NFResNet,
    nf_resnet18_small,
    nf_resnet34,
)
from pipeline.models.residual import ALPHA, Residual
from pipeline.rules.bptt import BPTT
from pipeline.spiking.encode import repeat
from pipeline.spiking.neuron import LIF
from pipeline.spiking.synapse import Conv2d
from tests.helpers.families import awake
from tests.helpers.rule_networks import attached, cross_entropy, outputs, refusals


def tiny(**choices) -> NFResNet:
    arguments = {
        "blocks": (1, 2),
        "classes": 5,
        "in_channels": 2,
        "width": 4,
        "stem": "small",
        "neuron": LIF(),
    }
    return NFResNet(**(arguments | choices))


def test_betas_of_34_layers():
    with torch.device("meta"):
        model = nf_resnet34()
    betas = [round(block.first.beta, 4) for block in residuals(model)]
    stage2 = [1.0198, 1.0392, 1.0583]
    stage3 = [1.0198, 1.0392, 1.0583, 1.0770, 1.0954]
    # The first block of a stage sees the variance that the stage before has piled up.
    assert betas == [1.0, 1.0198, 1.0392, 1.0583, *stage2, 1.0770, *stage3, 1.1136, 1.0198, 1.0392]


@pytest.mark.parametrize("classes", [10, 1000])
def test_first_logits_are_zero_and_the_first_loss_is_ln_K(classes):
    rule, model = attached(BPTT(), nf_resnet18_small(classes, width=4, blocks=(1, 1)))
    x_TB, loss_fn = torch.randn(2, 3, 3, 8, 8), cross_entropy(torch.arange(3))
    (objective,) = rule.loss_terms(model, x_TB, loss_fn)
    assert objective.logits.abs().max() == 0
    assert objective.loss.item() == pytest.approx(math.log(classes), rel=1e-6)


def standardized(conv: Conv2d, x: torch.Tensor) -> torch.Tensor:
    w = conv.weight
    scale = torch.sqrt(w.var((1, 2, 3), keepdim=True) * w[0].numel() + 1e-4)
    w = conv.gain * (w - w.mean((1, 2, 3), keepdim=True)) / scale  # type: ignore[operator]
    return nn.functional.conv2d(x, w, conv.bias, conv.stride, conv.kernel_size[0] // 2)


def residuals(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, Residual)]


def by_hand(model: NFResNet, x_BCHW: torch.Tensor, steps: int) -> torch.Tensor:
    """The published network, one frame at a time, with a soft reset at decay 0.5."""
    membranes: dict[nn.Module, torch.Tensor] = {}

    def neuron(key: nn.Module, x: torch.Tensor) -> torch.Tensor:
        u = 0.5 * membranes.get(key, torch.zeros_like(x)) + x
        s = (u >= 1).double()
        membranes[key] = u - s
        return s * 2.74

    logits = []
    for _ in range(steps):
        h = standardized(model.stem[0], x_BCHW)
        if len(model.stem) == 2:
            h = nn.functional.avg_pool2d(h, 3, 2, 1)
        for block in residuals(model):
            out = neuron(block.first, h / block.first.beta)
            identity = (
                h
                if isinstance(block.shortcut, nn.Identity)
                else standardized(block.shortcut[0].synapse, out)
            )
            for position, layer in enumerate(block.branch):
                out = neuron(layer, out) if position % 2 else standardized(layer.synapse, out)
            h = out * block.skip_gain * 0.2 + identity
        logits.append(model.classifier.weight @ h.mean((2, 3)).T + model.classifier.bias[:, None])
    return torch.stack(logits).transpose(1, 2)


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_against_an_independent_forward(bottleneck, stem):
    model = awake(tiny(bottleneck=bottleneck, stem=stem)).double()
    x_BCHW = torch.randn(3, 2, 16, 16, dtype=torch.float64)
    got, expected = outputs(model, repeat(x_BCHW, 4)), by_hand(model, x_BCHW, 4)
    assert got.shape == (4, 3, 5) and got.std() > 0.1
    assert torch.allclose(got, expected, atol=1e-10)


def test_the_variance_of_the_stream_is_as_expected_at_the_start():
    with torch.no_grad():
        y = tiny(width=256, in_channels=64).stem(torch.randn(1, 8, 64, 12, 12))[..., 2:-2, 2:-2]
    assert y.var().item() == pytest.approx(1, abs=0.1)
    assert ALPHA == 0.2


test_refuses = refusals(
    [
        ({"stem": "large"}, r"NFResNet: stem must be 'imagenet' or 'small'; got stem='large'"),
        ({"classes": 0}, r"NFResNet: classes must be a whole number >= 1; got classes=0"),
        ({"blocks": (1, 0)}, r"NFResNet: blocks must be whole numbers >= 1; got blocks=\(1, 0\)"),
        ({"blocks": ()}, r"NFResNet: blocks must be whole numbers >= 1; got blocks=\(\)"),
        ({"width": 0}, r"NFResNet: width must be a whole number >= 1; got width=0"),
    ],
    tiny,
)
