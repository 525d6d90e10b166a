"""Joules of a GPU: read from NVML by the card's own name, and nothing where there is no counter. No GPU is asked for here."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline.measure.joules import Joules
from pipeline.measure.meters import Meters


class NVMLError(Exception):
    pass


def stand_in(counter: Callable[[Any], int]) -> types.ModuleType:
    """NVML with one card, GPU-abc, whose counter is in mJ."""
    module = types.ModuleType("pynvml")

    def by_uuid(uuid: str) -> str:
        if uuid != "GPU-abc":
            raise NVMLError(uuid)
        return "card"

    module.__dict__.update(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetTotalEnergyConsumption=counter,
    )
    return module


@pytest.fixture
def a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="abc"))


@pytest.mark.usefixtures("a_card")
def test_millijoules_of_the_right_card_are_joules(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([5_000, 7_500])
    monkeypatch.setitem(sys.modules, "pynvml", stand_in(lambda card: next(readings)))
    joules = Joules(torch.device("cuda"))  # the first reading says whether there is a counter
    assert joules.read() == 7.5


@pytest.mark.usefixtures("a_card")
def test_a_card_without_a_counter_has_no_joules(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(card: Any) -> int:
        raise NVMLError("not supported")

    monkeypatch.setitem(sys.modules, "pynvml", stand_in(refuse))
    assert Joules(torch.device("cuda")).read() is None


def test_a_rank_without_a_counter_takes_part_in_the_mean() -> None:
    meters, asked = Meters(torch.nn.Linear(2, 2), batch_size=1, device=torch.device("cpu")), []
    assert meters.over_ranks(lambda peaks: peaks, lambda used: asked.append(used) or used).device_j is None
    assert len(asked) == 1


def test_a_cpu_has_none() -> None:
    assert Joules(torch.device("cpu")).read() is None


def test_a_run_sums_what_training_used_and_not_what_was_used_between(monkeypatch: pytest.MonkeyPatch) -> None:
    meters = Meters(torch.nn.Linear(2, 2), batch_size=1, device=torch.device("cpu"))
    readings = iter([10.0, 13.0, 20.0, 24.0])
    monkeypatch.setattr(meters._joules, "read", lambda: next(readings))
    meters.forget_peaks()  # training begins
    meters.note_peaks()  # 3 J later an evaluation begins
    meters.forget_peaks()  # which ends at 20 J
    assert meters.over_ranks(lambda peaks: peaks, lambda used: used / 2).device_j == 3.5  # of two ranks, the other used none
