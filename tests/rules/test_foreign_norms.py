"""Norms of torch and timm, which fold time into the batch: rules that differentiate step by step
refuse them by name.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pipeline.rules.base import Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.hlop import HLOP
from pipeline.rules.ide import IDE
from pipeline.rules.opzo import OPZO
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.rules.spide import SPIDE
from tests.helpers.rule_networks import batch, cross_entropy, learn, lif_network
from tests.rules import test_ide, test_spide

ROWS = ((1, 1, 1),)


class Folded(nn.Module):
    """A norm for `[N, C]` on `[T, B, C]`, as code for other libraries has it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x_TBC: Tensor) -> Tensor:
        return self.norm(x_TBC.flatten(0, 1)).view_as(x_TBC)


class StaysInEvaluation(nn.BatchNorm1d):
    def train(self, mode: bool = True) -> "StaysInEvaluation":
        return super().train(False)


def network(norm: nn.Module) -> nn.Sequential:
    first, *rest = lif_network()
    return nn.Sequential(first, Folded(norm), *rest).double()


@pytest.mark.parametrize(
    ("rule", "model"),
    [
        (BPTT(1), network),
        (BPTT(recompute=True), network),
        (SLTT(), network),
        (SLTT(2), network),
        (OTTT(), network),
        (OPZO(), network),
        (HLOP(SLTT(), rows=ROWS), network),
        (HLOP(OTTT(), rows=ROWS, skip=("1",)), network),
        (IDE(), lambda norm: nn.Sequential(test_ide.smallest_model(), Folded(norm))),
        (SPIDE(), lambda norm: nn.Sequential(test_spide.smallest_model(), Folded(norm))),
    ],
    ids=lambda each: each.label if isinstance(each, Rule) else "",
)
def test_step_by_step_they_are_refused(rule: Rule, model: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(ValueError) as refused:
        rule.attach(model(nn.BatchNorm1d(8)))
    said = str(refused.value)
    assert said.split(":")[0] in rule.label and "1.norm" in said
    assert "pipeline.spiking.norm" in said or "weights='standardized'" in said


def test_the_forward_of_slices_would_differ() -> None:
    """The reason for the refusal."""
    x_TBC, _ = batch(4)
    model = nn.Sequential(Folded(nn.BatchNorm1d(x_TBC.shape[-1]))).double()
    assert not torch.allclose(model(x_TBC), torch.cat([model(x_1BC) for x_1BC in x_TBC.split(1)]))


def test_bptt_of_all_steps_and_norms_that_rest_are_accepted() -> None:
    x_TBC, target = batch(3)
    for rule, norm in ((BPTT(), nn.BatchNorm1d(8)), (SLTT(), StaysInEvaluation(8))):
        model = network(norm)
        rule.attach(model)
        assert model.training
        assert len(learn(rule.loss_terms(model, x_TBC, cross_entropy(target)))) == (
            3 if isinstance(rule, SLTT) else 1
        )
