"""What a card is timed by, on the CPU in its place; and a card that fails, beside one that does not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pipeline.doctor import card
from pipeline.doctor.card import Card


def test_bytes_that_are_copied_and_operations_of_a_product_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is done, comes out right, and is counted as half a second's."""
    timed, done = card._seconds, []

    def half_a_second(what: str, wanted: float, work: Callable[[], Tensor]) -> float:
        assert timed(what, wanted, work) > 0
        done.append((tuple(work().shape), wanted))
        return 0.5

    monkeypatch.setattr(card, "COPIED", 1000)
    monkeypatch.setattr(card, "SIDE", 32)
    monkeypatch.setattr(card, "_seconds", half_a_second)
    assert card.speeds("cpu") == (4 * 1000 / 0.5, (32 * 32) * (32 + 32) / 0.5)  # an entry: as many products, and as many sums
    assert done == [((1000,), 1.0), ((32, 32), 32.0)]


def test_the_median_round_counts_and_the_first_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 60.0, 61.0, 61.125, 62.0, 62.25, 63.0, 63.5, 64.0, 64.75, 65.0, 66.0])
    monkeypatch.setattr(card, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    assert card._seconds("ones", 1.0, lambda: torch.ones(2)) == 0.5


def test_a_product_that_is_none_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"^a product of ones must be 4 everywhere; it is 4 to 5$"):
        card._seconds("a product of ones", 4.0, lambda: torch.tensor([4.0, 5.0]))


def test_a_card_that_fails_is_told_beside_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def speeds(device: str) -> tuple[float, float]:
        if device == "cuda:1":
            raise RuntimeError("CUDA error:\nunspecified launch failure")
        return 2.0, 3.0

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    monkeypatch.setattr(card, "speeds", speeds)
    well, sick = card.cards()
    assert well == Card(name="H100", copied_bytes_per_s=2.0, multiplied_per_s=3.0)
    assert sick == Card(name="failed: RuntimeError: CUDA error: unspecified launch failure")
