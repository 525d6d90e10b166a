"""A device whose memory runs out: half the samples at a time, the same batch, and the same weights but for the order of sums."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from pipeline.data.mixing import Mixing
from pipeline.guards.fitting import FILE
from pipeline.job import Job, Place
from pipeline.measure.memory import hardware
from pipeline.models.mlp import mlp
from pipeline.recipe import spec
from pipeline.refused import Refused
from pipeline.rules.base import Rule
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.run.attempt import Attempt
from pipeline.track.jsonl import read
from pipeline.weights import load_run
from pipeline.worker import run
from tests.processes import run_ranks
from tests.small import make_run, same_weights, small_recipe, train_inline

pytestmark = pytest.mark.timeout(120)

SEED = 20261127  # of the batch at which memory runs out


def room_for(patch: pytest.MonkeyPatch, samples: int) -> None:
    for rule in (SLTT, OTTT):
        _room_for(patch, rule, samples)


def _room_for(patch: pytest.MonkeyPatch, rule: type[Rule], samples: int) -> None:
    original = rule.objectives

    def objectives(self: Rule, model: Any, x_TB: Any, *words: Any, **more: Any) -> Any:
        if x_TB.shape[1] > samples:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, model, x_TB, *words, **more)

    patch.setattr(rule, "objectives", objectives)


def test_the_micro_batch_is_halved_until_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        room_for(patch, 3)
        summary = train_inline(tmp_path / "hit", small_recipe())
    assert summary is not None and [on["micro_batch"] for on in summary["trained_on"]] == [2]  # nothing of the others is left
    events = read(tmp_path / "hit" / "journal.jsonl")
    assert [event["micro_batch"] for event in events if event["event"] == "smaller"] == [4, 2]
    assert [(event["micro_batch"], event["accumulation"]) for event in events if event["event"] == "start"] == [
        (8, 1), (4, 2), (2, 4),
    ]  # fmt: skip
    train_inline(tmp_path / "told", small_recipe(micro_batch=2))
    assert same_weights(tmp_path / "hit", tmp_path / "told")
    train_inline(tmp_path / "whole", small_recipe(epochs=3, stop_after=20))
    train_inline(tmp_path / "halves", small_recipe(epochs=3, stop_after=20, micro_batch=2))
    one, other = (load_run(tmp_path / name).state_dict() for name in ("whole", "halves"))
    assert all(torch.allclose(one[name], other[name], rtol=1e-5, atol=1e-6) for name in one)


def test_what_was_trained_before_memory_ran_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any batch after the third, which was saved."""
    original, batches, had = SLTT.objectives, itertools.count(1), random.Random(SEED).randrange(3, 16)

    def objectives(self: SLTT, model: Any, x_TB: Any, *words: Any, **more: Any) -> Any:
        if x_TB.shape[1] > 4 and next(batches) > had:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, model, x_TB, *words, **more)

    monkeypatch.setattr(SLTT, "objectives", objectives)
    summary = train_inline(tmp_path / "hit", small_recipe())
    assert summary is not None
    assert [(on["world_size"], on["micro_batch"]) for on in summary["trained_on"]] == [(1, 8), (1, 4)]
    assert {tuple(on["hardware"].items()) for on in summary["trained_on"]} == {tuple(hardware().items())}
    assert json.loads((tmp_path / "hit" / "summary.json").read_text())["trained_on"] == summary["trained_on"]


def test_one_sample_that_does_not_fit_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room_for(monkeypatch, 0)
    with pytest.raises(Refused, match="training: the device's memory runs out with one sample at a time"):
        train_inline(tmp_path / "hit", small_recipe())


def test_mixing_takes_the_next_fewer_that_are_whole_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room_for(monkeypatch, 3)
    train_inline(tmp_path / "hit", small_recipe(batch_size=12, stop_after=2, mixing=spec(Mixing, mixup=0.5)))
    events = read(tmp_path / "hit" / "journal.jsonl")
    assert [event["micro_batch"] for event in events if event["event"] == "smaller"] == [6, 2]


@pytest.mark.parametrize(
    ("changes", "samples", "why"),
    [
        (
            {"rule": spec(OTTT, leak=0.5, update="objective"), "model": spec(mlp, classes=10, in_features=64, hidden=(8,))},
            8,
            r"OTTT.*: moves the weights at every time step and refuses accumulation; got .*micro_batch=4.*",
        ),
        ({"mixing": spec(Mixing, mixup=0.5), "micro_batch": 2}, 2, r"Mixing: a micro-batch must be even, .*; got 1"),
    ],
)
def test_where_no_fewer_can_be_taken_it_says_why_and_notes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], samples: int, why: str
) -> None:
    room_for(monkeypatch, 0)
    for _ in range(2):  # with more memory the run can still go on
        said = rf"training: the device's memory runs out with {samples} samples at a time, and fewer cannot be taken: {why}; take"
        with pytest.raises(Refused, match=said):
            train_inline(tmp_path / "hit", small_recipe(**changes))
    assert not (tmp_path / "hit" / FILE).exists()


@pytest.mark.distributed
def test_one_sample_that_does_not_fit_one_of_two_ranks_ends_the_run(tmp_path: Path) -> None:
    """The rank dies of it, which frees the other; what it noted is what every rank of the next attempt ends with."""
    job = make_run(tmp_path / "run", small_recipe(backend="deepspeed", micro_batch=1))
    with pytest.raises(ProcessRaisedException):
        run_ranks(_without_room_on_one, 2, tmp_path, job)
    assert (tmp_path / "run" / "ended1").read_text() == "ValueError"  # no Refused, which would say that every rank knows
    with pytest.raises(Refused, match="training: the device's memory runs out with one sample at a time"):
        run(job, Place())


@pytest.mark.distributed
def test_a_worker_that_dies_of_it_is_spoken_for_by_the_next_attempt(tmp_path: Path) -> None:
    """Rank 0, which holds the journal, has heard of a lost connection alone."""
    job = make_run(tmp_path / "run", small_recipe(stop_after=1))
    with pytest.raises(ProcessRaisedException):
        run_ranks(_without_room_on_one, 2, tmp_path, job)
    for _ in range(2):  # and once alone
        run(job, Place())
    told = [event for event in read(tmp_path / "run" / "journal.jsonl") if event["event"] in ("start", "smaller")]
    assert [(event["event"], event["micro_batch"]) for event in told] == [
        ("start", 4), ("smaller", 2), ("start", 2), ("start", 2),
    ]  # fmt: skip
    assert told[1]["reason"] == "memory ran out on another worker"


class InStep(Attempt):
    """All ranks have begun before one of them trains."""

    def _train(self) -> None:
        self.ranks.each(None)
        super()._train()


def _without_room_on_one(rank: int, ranks: int, job: Job) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            room_for(patch, 0)
        try:
            run(job, Place(rank, ranks), attempt_of=InStep)
        except Exception as error:
            (Path(job.run) / f"ended{rank}").write_text(type(error).__name__)
            raise


def test_a_note_that_is_damaged_is_named(tmp_path: Path) -> None:
    recipe = small_recipe(stop_after=1)
    train_inline(tmp_path / "hit", recipe)
    (tmp_path / "hit" / "micro_batch.json").write_text("0")
    with pytest.raises(Refused, match=r"micro_batch\.json: must hold a number of samples; got 0"):
        train_inline(tmp_path / "hit", recipe)
