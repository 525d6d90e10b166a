"""The clock by itself, and a sleep planted in each part of a real run, which must show in that part
alone.
"""

import builtins
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from pipeline.data.datasets.synthetic import Synthetic
from pipeline.measure.clock import COLLECTIVES, Clock, charge_collectives
from pipeline.measure.constants import PARTS, REST, SECTIONS
from pipeline.measure.meters import Meters
from pipeline.models.mlp import mlp
from pipeline.recipe.recipe import Checkpointing, Recipe, spec
from pipeline.rules import sltt
from pipeline.rules.base import World
from pipeline.rules.sltt import SLTT
from pipeline.track.journal import read
from pipeline.train import assemble, checkpointing, evaluation, trainer
from pipeline.train.backend.collectives import Ranks
from pipeline.train.backend.deepspeed import DeepSpeed
from pipeline.train.backend.plain import Plain
from pipeline.train.distillation import Distillation
from pipeline.train.loop import MicroBatch
from pipeline.train.objective import CrossEntropy
from pipeline.train.teaching import Teaching
from tests.helpers.processes import run_ranks
from tests.helpers.silent import train
from tests.helpers.small import train_inline
from tests.measure.conftest import Host
from tests.train.test_teaching import taught

SLEEP = 0.05
TOTAL = (
    1.2  # between batches, where load from elsewhere cannot be told by taking the least of several
)


# ---------------------------------------------------------------------------------------- by itself


def test_the_innermost_part_is_charged_and_the_parts_are_the_batch(host: Host) -> None:
    clock = Clock()
    with clock.batch():
        with clock.part("backward"):
            host.sleep(2)
            with clock.part("communication"):
                host.sleep(4)
            host.sleep(2)
        host.sleep(1)
    host.sleep(8)
    assert clock.take() == [
        dict.fromkeys((*PARTS, REST), 0.0) | {"backward": 4, "communication": 4, REST: 1}
    ]
    assert clock.take() == []


def test_outside_of_a_batch_nothing_is_charged_and_a_broken_batch_is_forgotten(host: Host) -> None:
    clock = Clock()
    with clock.part("communication"):
        host.sleep(1)
    with suppress(KeyError), clock.batch(), clock.part("forward"):
        host.sleep(1)
        raise KeyError
    with clock.batch():
        pass
    assert clock.take() == [dict.fromkeys((*PARTS, REST), 0.0)]


def test_collectives_are_given_back() -> None:
    own = [getattr(distributed, name) for name in COLLECTIVES]
    with charge_collectives(Clock()):
        charged = [getattr(distributed, name) for name in COLLECTIVES]
    assert {*own}.isdisjoint(charged)
    assert [getattr(distributed, name) for name in COLLECTIVES] == own


# ----------------------------------------------------------------------------------------- in a run


def sleeping(
    original: Callable[..., Any], is_slow: Callable[[], bool] = lambda: True
) -> Callable[..., Any]:
    def act(*args: Any, **kwargs: Any) -> Any:
        time.sleep(SLEEP if is_slow() else 0)
        return original(*args, **kwargs)

    return act


def recipe_of_a_few_steps() -> Recipe:
    """4 batches of one time step, one evaluation, one checkpoint."""
    objective = spec(Distillation, label_weight=0.0, form="soft")
    recipe = taught(rule=spec(SLTT), objective=objective, micro_batch=None, time_steps=1)
    return replace(recipe, stop_after=4, checkpoints=Checkpointing(every=0))


IN_A_BATCH: dict[str, tuple[Any, str]] = {  # where and what is slow, once in each batch
    "data_wait": (trainer, "next"),
    "transfer": (trainer, "to_time_first"),
    "teacher": (Teaching, "__call__"),
    "forward": (sltt, "slice_loss"),
    "backward": (Plain, "backward"),
    "optimizer": (Plain, "step"),
    "metrics": (torch.Tensor, "argmax"),
}
BETWEEN_BATCHES: dict[str, tuple[Any, str, int]] = {  # and how many times a run calls it
    "evaluation": (evaluation, "evaluate", 1),
    "checkpoint": (checkpointing, "weights_of", 1),
    "tracking": (trainer, "memory_now_bytes", 4),
    "coordination": (Ranks, "decide", 4),
    "fidelity": (assemble, "compare_gradients", 1),
}


def plant(monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> None:
    monkeypatch.setattr(
        where, name, sleeping(getattr(where, name, getattr(builtins, name, None))), raising=False
    )


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [event["metrics"] for event in read(folder / "run" / "journal.jsonl", "step")]


def least_of_a_step(folder: Path) -> dict[str, float]:
    """Of each part the least over the steps, as load from elsewhere only ever adds to it."""
    steps = metrics_of(folder)
    assert len(steps) == 4
    return {name: min(step[f"{name}_s"] for step in steps) for name in (*PARTS, REST)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Of the second run in this process: what is done once, such as imports, is not of a part."""
    return [
        seconds_of(tmp_path_factory.mktemp("undisturbed"), recipe_of_a_few_steps())
        for _ in range(2)
    ][-1]


def seconds_of(folder: Path, recipe: Recipe) -> dict[str, float]:
    summary = train_inline(folder / "run", recipe)
    assert summary is not None
    return {name: summary[f"{name}_s"] for name in (*PARTS, REST, *SECTIONS)}


def test_every_part_is_planted() -> None:
    assert {*IN_A_BATCH, "communication"} == set(PARTS)  # ranks that speak are below
    assert {*BETWEEN_BATCHES, "skipped"} == set(SECTIONS)  # in test_meters.py


@pytest.mark.parametrize("part", IN_A_BATCH)
def test_a_sleep_in_a_part_of_the_batch_shows_there_alone(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, name = IN_A_BATCH[part]
    plant(monkeypatch, where, name)
    seconds_of(tmp_path, recipe_of_a_few_steps())
    least = least_of_a_step(tmp_path)
    assert least.pop(part) > 0.9 * SLEEP
    assert max(least.values()) < 0.5 * SLEEP, least


@pytest.mark.parametrize("part", BETWEEN_BATCHES)
def test_a_sleep_between_batches_shows_in_its_part_alone(
    part: str, tmp_path: Path, undisturbed: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, name, times = BETWEEN_BATCHES[part]
    monkeypatch.setattr("tests.measure.test_clock.SLEEP", TOTAL / times)
    plant(monkeypatch, where, name)
    looks = {"evaluation.fidelity_every": 2} if part == "fidelity" else {}
    more: dict[str, float] = {}
    # A disk that stalls falls on another part by chance; a wrong part has the sleep in every run.
    for again in range(3):
        seconds = seconds_of(tmp_path / str(again), recipe_of_a_few_steps().override(looks))
        now = {name: seconds[name] - undisturbed[name] for name in seconds}
        assert now.pop(part) > 0.9 * TOTAL
        more = {name: min(value, more.get(name, value)) for name, value in now.items()}
        if max(more.values()) < 0.5 * TOTAL:
            return
    raise AssertionError(more)


def test_without_a_rest_the_parts_cover_the_step(tmp_path: Path) -> None:
    """At a size that is still small: 128 samples, 784-400-10, six steps of SLTT, each a forward and
    a backward of its own.
    """
    recipe = taught(
        rule=spec(SLTT),
        objective=spec(CrossEntropy),
        teacher=None,
        model=spec(mlp, in_features=784, hidden=(400,)),
        data=spec(Synthetic, samples=1280, val_samples=20, shape=(1, 28, 28)),
        batch_size=128,
        micro_batch=None,
        time_steps=6,
    )
    seconds_of(tmp_path, recipe)
    steps = metrics_of(tmp_path)
    shares = [sum(step[f"{name}_s"] for name in PARTS) / step["step_s"] for step in steps]
    # of single steps load from elsewhere may fall on the rest
    assert len(shares) == 10 and statistics.median(shares) > 0.97, shares


# ------------------------------------------------------------------------------------ between ranks


def slow_collectives(rank: int, ranks: int) -> dict[str, list[dict[str, float]]]:
    """By backend: the seconds of four batches, every collective slowed down in all but the
    first.
    """
    slow = {"on": False}
    for name in COLLECTIVES:
        setattr(distributed, name, sleeping(getattr(distributed, name), lambda: slow["on"]))
    clock = Clock()
    with charge_collectives(clock):
        return {
            f"{zero}": _four_batches(rank, ranks, zero, slow, clock) for zero in (None, 0, 1, 2)
        }


def _four_batches(
    rank: int, ranks: int, zero: int | None, slow: dict[str, bool], clock: Clock
) -> list[dict[str, float]]:
    network, rule = mlp(in_features=8, hidden=(16,), classes=3), SLTT()
    rule.attach(network, world=World(rank=rank, size=ranks))

    def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def batches() -> Any:
        x_TB, target_B = torch.randn(2, 4, 8), torch.randint(3, (4,))
        for step in range(4):
            slow["on"] = step > 0
            yield step, [MicroBatch(x_TB, target_B, range(4 * rank, 4 * rank + 4), 0.5)]
        slow["on"] = False

    backend = (
        Plain(network, sgd) if zero is None else DeepSpeed(network, sgd, micro_batch=4, zero=zero)
    )
    meters = Meters(
        network, batch_size=8, device=torch.device("cpu"), clock=clock, memory_every=10**9
    )
    train(rule, backend, batches(), meters)
    return clock.take()


@pytest.mark.full
@pytest.mark.distributed
def test_what_ranks_say_to_one_another_is_communication_alone(tmp_path: Path) -> None:
    """Under the plain backend and at every ZeRO stage."""
    for of_rank in run_ranks(slow_collectives, 2, tmp_path):
        assert len(of_rank) == 4
        for backend, (_, *slow) in of_rank.items():
            least = {name: min(seconds[name] for seconds in slow) for name in slow[0]}
            assert least.pop("communication") > 0.9 * SLEEP, backend
            assert max(least.values()) < 0.5 * SLEEP, (backend, least)
