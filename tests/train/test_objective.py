"""Losses against their formulas, in float64."""

import pytest
import torch
from torch.nn import functional as F

from pipeline.train.objective import CrossEntropy
from tests.helpers.rule_networks import refusals

LOGITS = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]], dtype=torch.float64)
TARGET = torch.tensor([2, 1])


def by_hand(smoothing: float) -> float:
    wanted_BK = smoothing / 3 + (1 - smoothing) * F.one_hot(TARGET, 3).double()
    q_BK = LOGITS.exp() / LOGITS.exp().sum(1, keepdim=True)
    return float(-(wanted_BK * q_BK.log()).sum(1).mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_and_label_smoothing(smoothing: float) -> None:
    assert float(CrossEntropy(label_smoothing=smoothing)(TARGET)(LOGITS)) == pytest.approx(
        by_hand(smoothing), abs=1e-12
    )


@pytest.mark.parametrize(
    ("goal", "wanted"), [("ones", [[1, 1, 1], [1, 1, 1]]), ("one_hot", [[0, 0, 1], [0, 1, 0]])]
)
def test_the_mixture_with_a_squared_error(goal: str, wanted: list[list[int]]) -> None:
    squared = float(((LOGITS - torch.tensor(wanted)) ** 2).mean())
    loss = float(CrossEntropy(mse=0.05, goal=goal)(TARGET)(LOGITS))  # type: ignore[arg-type]
    assert loss == pytest.approx(0.95 * by_hand(0.0) + 0.05 * squared, abs=1e-12)


@pytest.mark.parametrize("objective", [CrossEntropy(label_smoothing=0.1), CrossEntropy(mse=0.3)])
def test_a_mixed_target_has_the_mixture_of_the_losses(objective: CrossEntropy) -> None:
    """Both terms without a square of the target are linear in it."""
    other = torch.tensor([0, 0])
    shares = 0.7 * F.one_hot(TARGET, 3).double() + 0.3 * F.one_hot(other, 3).double()
    expected = 0.7 * float(objective(TARGET)(LOGITS)) + 0.3 * float(objective(other)(LOGITS))
    assert float(objective(shares)(LOGITS)) == pytest.approx(expected, abs=1e-12)


def test_the_squared_error_pulls_to_a_mixed_target() -> None:
    shares = torch.tensor([[0.25, 0.0, 0.75], [0.0, 1.0, 0.0]])
    loss = float(CrossEntropy(mse=1.0, goal="one_hot")(shares)(LOGITS))
    assert loss == pytest.approx(float(((LOGITS - shares) ** 2).mean()), abs=1e-12)


def test_half_precision_is_widened_first() -> None:
    assert CrossEntropy()(TARGET)(LOGITS.bfloat16()).dtype == torch.float32


test_refuses = refusals(
    [
        ({"mse": 1.5}, "mse must be in 0..1"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"goal": "one_hot"}, "no effect with mse=0"),
    ],
    CrossEntropy,
)
