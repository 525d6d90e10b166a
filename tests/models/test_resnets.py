"""SEW-ResNet, Spiking ResNet and MS-ResNet."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.models.ms_resnet import MSResNet, ms_resnet
from pipeline.models.sew_resnet import SEWResNet, sew_resnet
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.dropout import Dropout
from pipeline.spiking.encode import repeat
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.state import fresh_state

SMALL = {"blocks": (1, 1), "classes": 5, "width": 8, "over": "step"}
FAMILIES = {
    "sew": partial(SEWResNet, bottleneck=False, **SMALL),
    "sew, bottleneck": partial(SEWResNet, bottleneck=True, **SMALL),
    "spiking": partial(SEWResNet, bottleneck=False, shortcut="post_activation", **SMALL),
    "ms": partial(MSResNet, **SMALL),
    "ms, three, pooled": partial(MSResNet, stem="three", pooled=True, dropout=0.2, **SMALL),
    "ms, multiple": partial(MSResNet, shortcut="multiple", **SMALL),
    "ms, sws": partial(MSResNet, norm="sws", neuron=LIF(0.25, threshold=0.5), **SMALL),
    "ms, multiple, sws": partial(MSResNet, shortcut="multiple", norm="sws", neuron=LIF(0.25, threshold=0.5), **SMALL),
}


def awake(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "skip_gain" in name or (p.dim() == 1 and name.endswith("norm.weight")):
                p.uniform_(1, 2)
            elif p.dim() == 1:
                p.uniform_(0, 1)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_slices_equal_the_whole(family, mode):
    model = awake(FAMILIES[family]()).double().train(mode == "train")
    x_TBCHW = torch.randn(3, 2, 3, 33, 32, dtype=torch.float64)
    for dropout in [m for m in model.modules() if isinstance(m, Dropout)]:
        dropout.share = 0.0  # a mask is drawn for each fresh_state
    with torch.no_grad():
        with fresh_state(model):
            whole_TBK = model(x_TBCHW)
        with fresh_state(model):
            slices_TBK = torch.cat([model(x_BCHW[None]) for x_BCHW in x_TBCHW])
    assert whole_TBK.shape == (3, 2, 5) and whole_TBK.std() > 0
    assert (whole_TBK - slices_TBK).abs().max() < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make_rule", [BPTT, partial(SLTT, k=1, rescale=True), OTTT], ids=["BPTT", "SLTT-1", "OTTT"])
def test_trains(family, make_rule):
    model, rule = awake(FAMILIES[family]()), make_rule()
    if isinstance(rule, OTTT) and any(isinstance(m, BatchNorm) for m in model.modules()):
        with pytest.raises(ValueError, match=r"OTTT.*batch norm"):
            rule.attach(model)
        return
    rule.attach(model)
    target_B = torch.tensor([0, 1, 2])
    x_TBCHW = repeat(2 * torch.randn(3, 3, 32, 32), 2)
    for objective in rule.objectives(model, x_TBCHW, lambda logits_BK: F.cross_entropy(logits_BK, target_B), step=0):
        if objective.backward is not None:
            objective.backward.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or p.grad.abs().max() == 0]
    assert silent == []


def test_ms_block_starts_as_its_shortcut():
    """Published: the last batch norm of a block at gain 0, the others at the threshold."""
    gains = [float(m.weight.detach()[0]) for m in ms_resnet(18).modules() if isinstance(m, BatchNorm)]
    # stem; a block of the first kind has two norms and that of its shortcut, one of the second two
    assert gains == [0.5, *[0.5, 0.0, 0.5, 0.5, 0.0] * 4]


def test_sizes_of_the_image():
    with torch.device("meta"):
        for model, expected in ((sew_resnet(18), [56, 28, 14, 7]), (ms_resnet(18), [56, 28, 14, 7])):
            with fresh_state(model):
                h = model.stem(torch.empty(1, 1, 3, 224, 224))
                sizes = [h := stage(h) for stage in model.stages]
            assert [y.shape[-1] for y in sizes] == expected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sew_resnet(20), r"sew_resnet: depth must be one of 18, 34, 50, 101, 152; got depth=20"),  # type: ignore[arg-type]
        (lambda: ms_resnet(50), r"ms_resnet: depth must be one of 18, 34, 104; got depth=50"),  # type: ignore[arg-type]
        (lambda: FAMILIES["sew"](shortcut="membrane"), r"SEWResNet: shortcut must be 'sew' or 'post_activation'"),
        (lambda: FAMILIES["ms"](shortcut="sew"), r"MSResNet: shortcut must be 'membrane' or 'multiple'; got shortcut='sew'"),
        (lambda: FAMILIES["ms"](stem="two"), r"MSResNet: stem must be 'one' or 'three'; got stem='two'"),
        (lambda: FAMILIES["ms"](blocks=()), r"MSResNet: blocks must be whole numbers >= 1; got blocks=\(\)"),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()
