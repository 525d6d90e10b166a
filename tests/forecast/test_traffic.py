"""Operations and bytes of known products, and their roofline."""

import pytest
import torch

from pipeline.forecast.counts import Traffic
from pipeline.forecast.devices import DEVICES, Device, Operation

CARD = Device(
    name="made up",
    flops={"fp32": 100.0},
    bandwidth=10.0,
    memory=1e9,
    link=1.0,
    watts=1.0,
    launch=0.5,
    driver="A CARD",
    source="this test",
)


def noted(act) -> list[Operation]:
    with Traffic() as traffic:
        act()
    return traffic.operations


def test_a_product_reads_both_sides_and_writes_the_result() -> None:
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    assert noted(lambda: a @ b) == [Operation(2 * 3 * 4 * 5, (12 + 20 + 15) * 4)]


def test_views_move_nothing_and_what_is_repeated_is_read_once() -> None:
    x = torch.ones(2, 3)
    assert noted(lambda: x.t().unsqueeze(0).expand(7, 3, 2)) == []
    repeated = x.expand(100, 2, 3)
    assert noted(lambda: repeated + 1) == [Operation(0, (6 + 600) * 4)]


def test_a_backward_is_noted_too() -> None:
    weight = torch.ones(5, 4, requires_grad=True)
    x = torch.ones(3, 4)
    flops = [
        each.flops
        for each in noted(lambda: torch.nn.functional.linear(x, weight).sum().backward())
        if each.flops
    ]
    assert flops == [2 * 3 * 4 * 5] * 2  # forward, and the gradient of the weight


def test_the_roofline_takes_the_longer_of_both() -> None:
    operations = [Operation(1000, 10), Operation(10, 50)]
    assert CARD.busy_s(operations, "fp32") == pytest.approx(1000 / 100 + 50 / 10)


def test_cards_name_their_source() -> None:
    assert len(DEVICES) == 5
    for card in DEVICES.values():
        assert card.source and card.flops["fp32"] < 1e14 and card.memory >= 24e9
