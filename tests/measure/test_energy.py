"""The energy of an inference, estimated, and measured by NVML's counter of a card; no GPU is
needed.
"""

import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.measure.energy import (
    PRICES,
    EnergyCounter,
    EnergyReadings,
    Inference,
    RandomSample,
    describe_inference,
    energy_j,
    joules_per_sample,
)
from pipeline.measure.meters import Meters
from pipeline.measure.operations import Work
from pipeline.spiking.encode import is_static, repeat
from pipeline.spiking.neuron import LIF
from pipeline.spiking.synapse import Linear
from pipeline.train.evaluation import evaluate
from pipeline.train.objective import CrossEntropy


def test_a_published_pair() -> None:
    """Spikingformer-8-512 on ImageNet, T = 4 (Zhou et al. 2023, arXiv 2304.11954): 0.3473 G MAC and
    6.5175 G AC are 7.46 mJ.
    """
    assert energy_j(0.3473e9, 6.5175e9) * 1e3 == pytest.approx(7.46, abs=0.005)


def test_prices_are_the_published_ones_of_a_multiplication_and_an_addition() -> None:
    """In pJ (Horowitz 2014, figure 1.1.9): a MAC is both, an AC the addition alone."""
    published = {"fp32": (3.7, 0.9), "fp16": (1.1, 0.4), "int8": (0.2, 0.03)}
    assert {
        f"45 nm, {kind}": pytest.approx((multiplication + addition, addition))
        for kind, (multiplication, addition) in published.items()
    } == PRICES
    assert energy_j(1, 1, "45 nm, fp16") == pytest.approx(1.9e-12)


def test_an_addition_beside_a_multiplication_is_part_of_its_mac() -> None:
    assert Inference(Work(multiplications=3, additions=10, dense=20), samples=2).to_dict() == {
        "macs": 1.5,
        "acs": 3.5,
        "energy_j": pytest.approx(1.5 * 4.6e-12 + 3.5 * 0.9e-12),
        "prices": "45 nm, fp32",
        "energy_j_by_table": {
            "45 nm, fp32": pytest.approx(1.5 * 4.6e-12 + 3.5 * 0.9e-12),
            "45 nm, fp16": pytest.approx(1.5 * 1.5e-12 + 3.5 * 0.4e-12),
            "45 nm, int8": pytest.approx(1.5 * 0.23e-12 + 3.5 * 0.03e-12),
        },
        "samples": 2,
    }


@pytest.mark.parametrize(
    ("not_counted", "on_gpu", "expected"),
    [
        ((), False, "(45 nm, fp32), not measured on a CPU"),
        (
            (),
            True,
            "(45 nm, fp32), not measured: a card has no counter, or its counter did not move",
        ),
        (("fused",), False, "(45 nm, fp32, without fused), not measured on a CPU"),
    ],
)
def test_an_inference_is_described_in_a_line(
    not_counted: tuple[str, ...], on_gpu: bool, expected: str
) -> None:
    described = {**Inference(Work(), 2, not_counted).to_dict(), "energy_j": 1.43e-5}
    assert describe_inference(described, on_gpu=on_gpu) == (
        f"an inference: 14.3 µJ estimated {expected}"
    )


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
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="abc")
    )


@pytest.mark.usefixtures("a_card")
@pytest.mark.parametrize(
    ("device", "counter", "joules"),
    [
        ("cuda", lambda card: 7_500, 7.5),
        ("cuda", Mock(side_effect=NVMLError("not supported")), None),
        ("cpu", None, None),
    ],
)
def test_millijoules_of_the_right_card_are_joules_where_there_is_a_counter(
    device: str, counter: Any, joules: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.measure.energy.pynvml", stand_in(counter))
    assert EnergyCounter(torch.device(device)).read() == joules


def test_a_rank_without_a_counter_takes_part_in_the_mean() -> None:
    meters, asked = Meters(torch.nn.Linear(2, 2), batch_size=1, device=torch.device("cpu")), []
    totals = meters.totals_over_ranks(lambda peaks: peaks, lambda used: asked.append(used) or used)
    assert totals.device_j is None and len(asked) == 1


def test_a_run_sums_what_training_used_and_not_what_was_used_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meters = Meters(torch.nn.Linear(2, 2), batch_size=1, device=torch.device("cpu"))
    readings = iter([10.0, 13.0, 20.0, 24.0])
    monkeypatch.setattr(meters._energy_counter, "read", lambda: next(readings))
    meters.forget_peaks()  # training begins
    meters.note_peaks()  # 3 J later an evaluation begins
    meters.forget_peaks()  # which ends at 20 J
    # of two ranks, the other used none
    assert meters.totals_over_ranks(lambda peaks: peaks, lambda used: used / 2).device_j == 3.5


@pytest.mark.usefixtures("a_card")
def test_an_evaluation_is_measured_from_its_first_batch_to_its_last_and_told_by_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used_mj = [5_000_000]  # before it began
    monkeypatch.setattr("pipeline.measure.energy.pynvml", stand_in(lambda card: used_mj[0]))
    network = nn.Sequential(Linear(2, 3), LIF(), Linear(3, 2))

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for first in (0, 4, 8):
            used_mj[0] += 300  # while it is waited for
            yield (
                torch.ones(2, 4, 2),
                torch.zeros(4, dtype=torch.int64),
                torch.arange(first, first + 4),
            )

    network.register_forward_hook(lambda *_: used_mj.__setitem__(0, used_mj[0] + 100))
    found = evaluate(
        network,
        batches(),
        CrossEntropy(),
        counts_operations=True,
        energy_counter=EnergyCounter(torch.device("cuda")),
    )
    # At each of two time steps; then to count operations, of two samples at once.
    assert found.inference is not None and used_mj == [5_000_000 + 3 * (300 + 2 * 100) + 6 * 100]
    measured_j = joules_per_sample([found.readings])
    assert measured_j == pytest.approx(1.5 / 12)
    told = found.inference.to_dict(measured_j)
    assert told["measured_j"] == measured_j and told["energy_j"] < 1e-9
    assert describe_inference(told, on_gpu=True).endswith(
        "pJ estimated (45 nm, fp32), 125 mJ measured on the whole card, idle power and waits for"
        " data included"
    )


def rank(card: str, samples: int, start_j: float | None, end_j: float | None) -> EnergyReadings:
    return EnergyReadings(card=card, samples=samples, start_j=start_j, end_j=end_j)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (rank("GPU-b", 20, 1000, 1040), 100 / 50),
        (rank("GPU-a", 20, 110, 190), 90 / 50),
        (rank("GPU-b", 0, 7, 7), 60 / 30),  # evaluated nothing
    ],
)
def test_cards_add_and_one_that_ranks_share_counts_once(
    other: EnergyReadings, expected: float
) -> None:
    assert joules_per_sample([rank("GPU-a", 30, 100, 160), other]) == expected


@pytest.mark.parametrize(
    "ranks",
    [
        [rank("GPU-a", 30, 100, 160), rank("GPU-b", 20, None, None)],
        [rank("GPU-a", 30, 100, 160), rank("GPU-b", 20, 1000, None)],
        [
            rank("GPU-a", 30, 100, 160),
            rank("GPU-b", 20, 1000, 1000),
        ],  # its counter has not moved yet
        [rank("", 30, None, None)],
        [],
    ],
)
def test_what_some_card_did_not_tell_is_not_measured(ranks: list[EnergyReadings]) -> None:
    assert joules_per_sample(ranks) is None


# ------------------------------------------------------------------------------------------ samples


def places(evenly: RandomSample) -> list[int]:
    """Of the samples that are held, each of which was its place in the set."""
    return [int(value) for x_TB in evenly.batches(3) for value in x_TB[0].flatten()]


@pytest.mark.parametrize("most", [1, 2, 5, 8])
def test_all_are_held_until_there_are_so_many_and_then_so_many(most: int):
    evenly, others, held = RandomSample(most), RandomSample(most), list[int]()
    for place in range(100):
        evenly.add(torch.full((1, 1, 1), float(place)))
        held = places(evenly)
        assert len(evenly) == len(set(held)) == min(place + 1, most) and max(held) <= place
    for first in range(0, 100, 7):
        others.add(torch.arange(first, min(100, first + 7.0))[None, :, None])
    assert places(others) == held


@pytest.mark.parametrize("classes", [2, 7, 8, 10, 16])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_each_class_is_among_them_and_each_about_as_often(classes: int, is_sorted: bool):
    """Whether the set is sorted by class or its classes take turns."""
    samples = 1600
    evenly = RandomSample(640)
    for first in range(0, samples, 100):
        evenly.add(torch.arange(first, first + 100.0)[None, :, None])
    held = np.array(places(evenly))
    counts = np.bincount(
        held * classes // samples if is_sorted else held % classes, minlength=classes
    )
    assert np.all(np.abs(counts - 640 / classes) < 4 * np.sqrt(640 / classes))


def test_still_images_are_held_once_and_stay_still():
    x_B = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    moving_TB = torch.randn(3, 5, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    for x_TB in (repeat(x_B, 3), moving_TB):
        evenly = RandomSample(8)
        evenly.add(x_TB)
        first, second = evenly.batches(4)
        assert is_static(first) == is_static(second) == is_static(x_TB)
        assert torch.equal(by_first(torch.cat([first, second], dim=1)), by_first(x_TB))


def by_first(x_TB: torch.Tensor) -> torch.Tensor:
    return x_TB[:, x_TB[0].flatten(1)[:, 0].argsort()]
