"""Each rule's gradient on the device against float64 on a CPU."""

import pytest
import torch
from torch import Tensor

from pipeline.rules.base import World
from tests.helpers.cards import device_of
from tests.helpers.rule_cases import CASES, Case
from tests.helpers.rule_networks import batch, cross_entropy, gradients

# Of the largest gradient. No spike of these networks is so near its threshold that float32 moves
# it.
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-3}


def gradients_on(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    rule, model = case.rule(), case.model().to(device, dtype)
    x_TBC, target_B = batch(4)
    x_TBC, target_B = x_TBC.to(device, dtype), target_B.to(device)
    about = {"world": World(seed=7), "over_time": rule.over_time_choices[0]}
    torch.manual_seed(0)
    return {
        name: g.cpu().double()
        for name, g in gradients(rule, model, x_TBC, cross_entropy(target_B), **about).items()
    }


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float64, marks=pytest.mark.gpu),
    ],
)
def test_the_gradient_is_that_of_float64_on_a_cpu(
    device: str, dtype: torch.dtype, case: Case
) -> None:
    expected = gradients_on(case, torch.device("cpu"), torch.float64)
    found = gradients_on(case, device_of(device), dtype)
    most = max(float(g.abs().max()) for g in expected.values())
    assert most > 0
    apart = {name: float((found[name] - g).abs().max()) / most for name, g in expected.items()}
    assert max(apart.values()) <= CLOSE[dtype], apart
