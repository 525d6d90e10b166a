"""The running average of the weights: its closed form, timm's, a resume to the bit, and two
DeepSpeed ranks at every stage.
"""

from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, distributed, nn

from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.state import fresh_state
from pipeline.spiking.synapse import Linear
from pipeline.train.backend.base import Backend
from pipeline.train.backend.deepspeed import DeepSpeed
from pipeline.train.backend.ema import EMABackend
from pipeline.train.backend.plain import Plain
from tests.helpers.captured import write_captured
from tests.helpers.processes import run_ranks

DECAY, STEPS, BATCH = 0.8, 5, 8


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(Linear(3, 4), BatchNorm(4), LIF(), Linear(4, 2))


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.3, momentum=0.9)


def batch(step: int, rows: slice = slice(None)) -> Tensor:
    return torch.randn(2, BATCH, 3, generator=torch.Generator().manual_seed(step))[:, rows]


def train(
    backend: Backend, first: int, last: int, rows: slice = slice(None)
) -> list[dict[str, Tensor]]:
    """The weights after each step; the shares of `rows` sum to 1 over ranks."""
    after = []
    for step in range(first, last):
        x_TBC = batch(step, rows).to(next(backend.network.parameters()))
        with fresh_state(backend.network):
            backend.backward((backend.model(x_TBC) - 1).square().mean(), x_TBC.shape[1] / BATCH)
        backend.step()
        after.append(values(backend))
    return after


def closed_form(weights: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """a_n = d^n w_0 + (1 - d) sum_k d^(n - k) w_k"""
    powers = [DECAY**STEPS, *((1 - DECAY) * DECAY ** (STEPS - k) for k in range(1, STEPS + 1))]
    return {
        name: sum(
            (power * each[name] for power, each in zip(powers, weights, strict=True)),
            torch.zeros(()),
        )
        for name in weights[0]
    }


def values(backend: Backend) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in backend.network.state_dict().items()}


def published(backend: Backend) -> dict[str, Tensor]:
    with backend.published():
        return values(backend)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_closed_form() -> None:
    """Running statistics included, in float64."""
    backend = EMABackend(Plain(network().double(), sgd), decay=DECAY)
    weights = [values(backend), *train(backend, 0, STEPS)]
    assert (weights[-1]["1.running_mean"] != weights[0]["1.running_mean"]).any()
    expected = closed_form(weights)
    for name, found in published(backend).items():
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-14)


def test_it_is_timms() -> None:
    plain, averaged = Plain(network(), sgd), EMABackend(Plain(network(), sgd), decay=DECAY)
    theirs = ModelEmaV3(plain.network, decay=DECAY)
    for step in range(STEPS):
        train(plain, step, step + 1)
        theirs.update(plain.network)
        train(averaged, step, step + 1)
    assert same(published(averaged), theirs.module.state_dict())
    assert same(values(averaged), values(plain))  # the average moves no weight


def test_the_weights_are_back_after_an_evaluation_that_failed() -> None:
    backend = EMABackend(Plain(network(), sgd), decay=DECAY)
    [*_, last] = train(backend, 0, 2)
    evaluation = backend.published()
    evaluation.__enter__()
    assert not same(values(backend), last)
    assert not evaluation.__exit__(KeyError, KeyError(), None)
    assert same(values(backend), last)


def test_a_new_task_begins_a_new_average() -> None:
    backend = EMABackend(Plain(network(), sgd), decay=DECAY)
    [*_, last] = train(backend, 0, 3)
    assert not same(published(backend), last)
    backend.reset_optimizer()
    assert same(published(backend), last)


def _two_ranks(rank: int, ranks: int, folder: str) -> dict[str, bool | float]:
    rows = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    found: dict[str, bool | float] = {}
    for zero in (0, 1, 2):
        make = lambda seed, zero=zero: EMABackend(
            DeepSpeed(network(seed), sgd, micro_batch=BATCH // ranks, zero=zero), decay=DECAY
        )
        backend, other = make(0), make(1)
        weights = [values(backend), *train(backend, 0, 3, rows)]
        published(backend)  # what an evaluation does must leave no trace in what DeepSpeed keeps
        place = Path(folder) / str(zero)
        place.mkdir(parents=True, exist_ok=True)
        write_captured(backend.capture(), place)
        distributed.barrier()
        weights += train(backend, 3, STEPS, rows)
        ours = published(backend)
        for name, expected in closed_form(weights).items():
            found[f"gap {zero} {name}"] = float((ours[name] - expected).abs().max())
        found[f"moved {zero}"] = float((weights[-1]["0.weight"] - ours["0.weight"]).abs().max())
        other.load(place)
        # The checkpoint keeps the running statistics of each rank: pipeline/train/checkpoint.
        other.network.load_state_dict(
            {name: weights[3][name] for name in ("1.running_mean", "1.running_var")}, strict=False
        )
        train(other, 3, STEPS, rows)
        found[f"same {zero}"] = same(published(other), ours) and same(values(other), weights[-1])
    return found


@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_two_ranks_average_alike_at_every_stage_and_resume_to_the_same_bits(tmp_path: Path) -> None:
    for found in run_ranks(_two_ranks, 2, tmp_path, str(tmp_path / "saved")):
        assert max(gap for name, gap in found.items() if name.startswith("gap")) < 1e-6
        for zero in (0, 1, 2):
            assert found[f"moved {zero}"] > 1e-3 and found[f"same {zero}"] is True


STATISTICS = ("1.running_mean", "1.running_var")


def _saves(rank: int, ranks: int, folder: str) -> dict[str, Tensor]:
    """Its own averages of running statistics, which are saved."""
    backend = EMABackend(DeepSpeed(network(), sgd, micro_batch=BATCH // ranks), decay=DECAY)
    train(backend, 0, 3, slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks))
    write_captured(backend.capture(), Path(folder))
    return published(backend)


def _loads(rank: int, ranks: int, folder: str) -> dict[str, Tensor]:
    backend = EMABackend(DeepSpeed(network(1), sgd, micro_batch=1), decay=DECAY)
    backend.load(Path(folder))
    return published(backend)


@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_averages_of_running_statistics_are_a_ranks_own_and_their_mean_at_another_number_of_ranks(
    tmp_path: Path,
) -> None:
    saved, two, *others = (tmp_path / name for name in ("saved", "two", "2", "1", "3"))
    for folder in (saved, two, *others):
        folder.mkdir()
    own = run_ranks(_saves, 2, two, str(saved))
    mean = {name: (own[0][name] + own[1][name]) / 2 for name in STATISTICS}
    assert not any(torch.equal(own[0][name], own[1][name]) for name in STATISTICS)
    again, fewer, more = (
        run_ranks(_loads, int(folder.name), folder, str(saved)) for folder in others
    )
    assert all(same(found, there) for found, there in zip(again, own, strict=True))
    for found in (*fewer, *more):
        assert same(found, {**own[0], **mean})
