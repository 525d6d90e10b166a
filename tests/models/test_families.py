"""What every residual family owes: slices of time equal the whole, and every weight learns."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from pipeline.rules.base import Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.dropout import Dropout
from pipeline.spiking.encode import repeat
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.state import fresh_state
from tests.helpers.families import RESNETS, STREAMS, awake, small_qkformer
from tests.helpers.rule_networks import cross_entropy, learn, outputs

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    name: lambda build=build: awake(build()) for name, build in RESNETS.items()
}
FAMILIES |= {
    f"qkformer, {shortcut}, {norm}": partial(small_qkformer, shortcut, norm)
    for shortcut, norm in STREAMS
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("still", [False, True])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_slices_equal_the_whole(family, mode, still):
    model = FAMILIES[family]().double().train(mode == "train")
    x_TBCHW = torch.randn(3, 2, 3, 33, 32, dtype=torch.float64)
    if still:
        x_TBCHW = repeat(x_TBCHW[0], 3)
    for dropout in [m for m in model.modules() if isinstance(m, Dropout)]:
        dropout.share = 0.0  # a mask is drawn for each fresh_state
    with torch.no_grad():
        whole_TBK = outputs(model, x_TBCHW, grad=True)
        with fresh_state(model):
            slices_TBK = torch.cat([model(x_BCHW[None]) for x_BCHW in x_TBCHW])
    assert whole_TBK.shape == (3, 2, 5) and whole_TBK.std() > 0
    assert (whole_TBK - slices_TBK).abs().max() < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "make_rule", [BPTT, partial(SLTT, k=1, rescale=True), OTTT], ids=["BPTT", "SLTT-1", "OTTT"]
)
def test_every_weight_that_the_loss_reaches_learns(family, make_rule: Callable[[], Rule]):
    """OTTT takes the normaliser-free networks alone."""
    model, rule = FAMILIES[family](), make_rule()
    if isinstance(rule, OTTT) and any(isinstance(m, BatchNorm) for m in model.modules()):
        with pytest.raises(ValueError, match=r"OTTT.*batch norm.*stem"):
            rule.attach(model)
        return
    rule.attach(model)
    x_TBCHW = repeat(3 * torch.randn(3, 3, 32, 32), 2)
    learn(rule.loss_terms(model, x_TBCHW, cross_entropy(torch.tensor([0, 1, 2])), step=0))
    silent = [
        n
        for n, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or p.grad.abs().max() == 0
    ]
    assert silent == []
