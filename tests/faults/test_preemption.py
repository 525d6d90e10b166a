"""A notice that a machine is taken away, and whoever asks for a save: a checkpoint after the step
at hand, and on it goes.
"""

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from pipeline.models.feedback import fc_feedback
from pipeline.recipe.recipe import Checkpointing, Recipe, Spec, spec, write_json
from pipeline.rules.base import Rule
from pipeline.rules.ide import IDE
from pipeline.rules.spide import SPIDE
from pipeline.track.mlflow import Translation
from pipeline.train import checkpointing, evaluation, trainer
from pipeline.train.backend.collectives import Ranks
from pipeline.train.checkpoint import read_trainer, step_folders
from pipeline.train.evaluation import Evaluation
from pipeline.train.job import Job, Notice, RankInfo
from pipeline.train.metadata import rule_metrics
from pipeline.train.worker import run
from tests.helpers.interruptions import before_batch, between_batches, die, dies
from tests.helpers.processes import run_ranks
from tests.helpers.small import events, make_run, same_weights, small_recipe, steps_of

SEED = 20261127  # of the steps at which something happens
ASKED = random.Random(SEED).randrange(1, 8)


def rarely_saved(**changes: Any) -> Recipe:
    """A run that saves at the end of an epoch alone, unless it is asked to."""
    return small_recipe(checkpoints=Checkpointing(every=0), **changes)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_run(tmp_path / "run", rarely_saved())


def notice_within(seconds: float) -> Notice:
    return Notice(("node",), time.time() + seconds)


def told_of(job: Job) -> list[tuple[str, int]]:
    found = events(Path(job.run), "preempted", "checkpoint", "evaluation")
    return [(event["event"], event["step"]) for event in found]


def assert_as(untouched: Path, job: Job, *, checkpoints: list[int]) -> None:
    """The bits and evaluations of a run that nothing happened to, with checkpoints at these
    steps.
    """
    assert steps_of(Path(job.run), "checkpoint") == checkpoints
    ours, theirs = (
        [(event["step"], event["metrics"]) for event in events(each, "evaluation")]
        for each in (Path(job.run), untouched)
    )
    assert ours == theirs and same_weights(Path(job.run), untouched)


def test_a_notice_is_saved_upon_once_and_the_run_goes_on(job: Job, untouched: Path) -> None:
    told = random.Random(SEED + 1).randrange(1, 8)
    notice = Mock(side_effect=chain(repeat(None, told - 1), repeat(notice_within(120))))
    assert run(job, RankInfo(notice=notice)) is not None
    [event] = events(Path(job.run), "preempted")
    assert (event["step"], event["machines"]) == (told, ["node"])
    assert 60 < event["seconds_left"] <= 120
    assert_as(untouched, job, checkpoints=[told, 8, 8, 16, 16])
    assert Translation().tags(event) == {"spiketrain.preemptions": "1"}
    counted = Translation()
    tags = [counted.tags({"event": "unwritten", "step": 3}) for _ in range(2)]
    assert tags[-1] == {"spiketrain.unwritten_checkpoints": "2"}


def test_a_notice_is_saved_upon_once_more_before_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, step = [], random.Random(SEED + 2).randrange(3)

    def slowly(training: trainer.Trainer) -> None:
        if training.step == step:
            told.append(notice_within(3.6))
        time.sleep(0.1 if told else 0.0)

    before_batch(monkeypatch, slowly)
    monkeypatch.setattr(checkpointing, "MARGIN_S", 2.8)
    recipe = rarely_saved(data=small_recipe().data.with_(samples=160), stop_after=12)
    job = make_run(tmp_path / "run", recipe)
    assert run(job, RankInfo(notice=lambda: told[-1] if told else None)) is not None
    assert steps_of(tmp_path / "run", "preempted") == [step + 1]
    first, last, *others = events(tmp_path / "run", "checkpoint")
    assert first["step"] == step + 1 < last["step"] < 12 and last["time"] < told[0].deadline
    assert [event["step"] for event in others] == [12, 12]


def test_who_asks_for_a_save_may_know_of_a_notice_first(
    job: Job, untouched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the controller does, which takes the machine's workers away as soon as they have saved."""
    asked = sorted(random.Random(SEED + 3).sample(range(1, 8), 2))

    def ask(training: trainer.Trainer) -> None:
        write_json(training.folder / "save", asdict(notice_within(60)))

    for step in asked:
        between_batches(monkeypatch, ask, step=step)
    assert run(job, RankInfo()) is not None
    [event] = events(Path(job.run), "preempted")  # told once
    assert (event["step"], event["machines"]) == (asked[0], ["node"])
    assert 0 < event["seconds_left"] <= 60
    assert_as(untouched, job, checkpoints=[*asked, 8, 8, 16, 16])


@pytest.mark.parametrize("step", [ASKED, 8])
def test_a_save_that_is_asked_for_comes_at_the_next_step(
    job: Job, untouched: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    original = trainer.Trainer._between_batches

    def between(self: trainer.Trainer, epoch: int, *, last: bool) -> None:
        if self.step == step:
            (self.folder / "save").write_text("2 workers become 3")
        original(self, epoch, last=last)
        assert not (self.folder / "save").exists()

    monkeypatch.setattr(trainer.Trainer, "_between_batches", between)
    assert run(job, RankInfo()) is not None
    assert told_of(job)[0][0] == "checkpoint"
    assert_as(untouched, job, checkpoints=sorted([step, 8, 16]))


def in_an_evaluation(
    patch: pytest.MonkeyPatch, act: Callable[[trainer.Trainer], object], *, of: int
) -> None:
    """Act while the evaluation after `of` steps is under way, with batches of it to come."""
    original = trainer.Trainer._evaluate

    def evaluate(self: trainer.Trainer) -> list[Evaluation]:
        if self.step == of:
            act(self)
        return original(self)

    patch.setattr(evaluation, "LOOK_S", -1.0)  # after every batch
    patch.setattr(trainer.Trainer, "_evaluate", evaluate)


def ask_in_an_evaluation(
    patch: pytest.MonkeyPatch, *, of: int, file: str = "stop", said: str = "SIGTERM"
) -> None:
    in_an_evaluation(patch, lambda training: (training.folder / file).write_text(said), of=of)


def told_in_an_evaluation(patch: pytest.MonkeyPatch, *, of: int) -> Callable[[], Notice | None]:
    """What a worker hears whom Ray tells of a machine then."""
    told: list[Notice] = []
    in_an_evaluation(patch, lambda _: told.append(notice_within(60)), of=of)
    return lambda: told[-1] if told else None


def stop_in_an_evaluation(job: Job, *, of: int) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        ask_in_an_evaluation(patch, of=of)
        assert run(job, RankInfo()) is None
    assert steps_of(Path(job.run), "evaluation") == [8][: of // 8 - 1]
    (Path(job.run) / "stop").unlink()  # as whoever resumes does
    summary = run(job, RankInfo())
    assert summary is not None
    return summary


@pytest.mark.parametrize(("step", "checkpoints"), [(8, [8, 8, 16]), (16, [8, 16, 16])])
def test_a_stop_waits_for_no_evaluation_which_is_made_up_for(
    job: Job, untouched: Path, step: int, checkpoints: list[int]
) -> None:
    stop_in_an_evaluation(job, of=step)
    assert steps_of(Path(job.run), "stopped") == [step]
    assert_as(untouched, job, checkpoints=checkpoints)


@pytest.mark.parametrize(
    "rule",
    [spec(IDE), pytest.param(spec(SPIDE, steps=8), marks=pytest.mark.full)],
    ids=["IDE", "SPIDE"],
)
def test_what_the_rule_said_of_its_last_batch_is_told_by_whoever_makes_up_for_the_evaluation(
    tmp_path: Path, rule: Spec
) -> None:
    """That attempt trains no batch: 0 would be a perfect solve, and a silent network."""
    recipe = rarely_saved(
        model=spec(fc_feedback, in_features=64, hidden=12), rule=rule, over_time="mean"
    )
    whole = run(make_run(tmp_path / "whole", recipe), RankInfo())
    resumed = stop_in_an_evaluation(make_run(tmp_path / "run", recipe), of=16)
    assert whole is not None
    assert resumed["rule_metrics"] == whole["rule_metrics"] != {}


@pytest.mark.parametrize("rule", [IDE(), SPIDE()])
def test_of_no_batch_nothing_is_told(rule: Rule) -> None:
    saved = dict.fromkeys(rule.metrics(), 0.5)
    assert saved and rule_metrics(rule, Ranks(), {}) == {}
    assert rule_metrics(rule, Ranks(), saved) == saved


@pytest.mark.parametrize("how", ["a save", "a notice"])
def test_a_save_waits_for_no_evaluation_which_is_begun_anew(
    job: Job, untouched: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    place = RankInfo()
    if how == "a save":
        ask_in_an_evaluation(
            monkeypatch, of=8, file="save", said=json.dumps(asdict(notice_within(60)))
        )
    else:
        place = RankInfo(notice=told_in_an_evaluation(monkeypatch, of=8))
    assert run(job, place) is not None
    assert not (Path(job.run) / "save").exists()
    assert told_of(job)[:3] == [("preempted", 8), ("checkpoint", 8), ("evaluation", 8)]
    assert steps_of(Path(job.run), "preempted") == [8]
    # The second checkpoint of each has its score.
    assert_as(untouched, job, checkpoints=[8, 8, 16, 16])


def test_what_dies_in_an_evaluation_has_saved_before_it(
    job: Job, untouched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "MAX_UNSAVED_S", -1.0)
    with dies(lambda patch: patch.setattr(trainer, "evaluate_tasks", die)):
        run(job, RankInfo())
    assert run(job, RankInfo()) is not None
    assert steps_of(Path(job.run), "start") == [0, 8]
    last = read_trainer(step_folders(Path(job.run) / "checkpoints")[-1])
    assert last["score"] is not None and not last["is_epoch_end_due"]
    # Without a score before each evaluation, and with it.
    assert_as(untouched, job, checkpoints=[8, 8, 16, 16])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("file", "kind", "at", "evaluated"),
    [("stop", "stopped", [8], []), ("save", "checkpoint", [8, 8, 16], [8, 16])],
)
def test_two_ranks_leave_an_evaluation_together_or_save_in_it(
    tmp_path: Path, file: str, kind: str, at: list[int], evaluated: list[int]
) -> None:
    """Also where one of them alone has seen what is asked, or has no more batches."""
    summaries = run_ranks(
        _asked_one, 2, tmp_path, make_run(tmp_path / "run", rarely_saved(backend="deepspeed")), file
    )
    assert [each is None for each in summaries] == [file == "stop"] * 2
    assert steps_of(tmp_path / "run", kind) == at
    assert steps_of(tmp_path / "run", "evaluation") == evaluated


@pytest.mark.distributed
def test_two_ranks_save_in_an_evaluation_upon_what_one_of_them_has_heard(
    tmp_path: Path, job: Job
) -> None:
    run_ranks(_asked_one, 2, tmp_path, job, "")
    assert told_of(job)[:3] == [("preempted", 8), ("checkpoint", 8), ("evaluation", 8)]
    assert steps_of(tmp_path / "run", "preempted") == [8]
    assert steps_of(tmp_path / "run", "evaluation") == [8, 16]


def _asked_one(rank: int, ranks: int, job: Job, file: str) -> object:
    """Rank 0, by a file; without one, rank 1 hears a notice."""
    with pytest.MonkeyPatch.context() as patch:
        place = RankInfo(rank, ranks, "cpu", rank)
        if rank == 1 and not file:
            place = replace(place, notice=told_in_an_evaluation(patch, of=8))
        if file and rank == 0:
            ask_in_an_evaluation(patch, of=8, file=file)
        elif file:
            patch.setattr(evaluation, "LOOK_S", 1e9)
        return run(job, place)


@pytest.mark.distributed
def test_a_group_that_is_taken_from_workers_who_train_is_no_refusal(tmp_path: Path) -> None:
    """As Ray (2.60) does it at the end of a notice, and after it starts others."""
    job = make_run(tmp_path / "run", small_recipe(backend="deepspeed"))
    (tmp_path / "meeting").mkdir()
    said = run_ranks(_without_a_group, 2, tmp_path / "meeting", job)
    assert said == ["worker: Ray removed its process group during training"] * 2
    assert not (tmp_path / "run" / "refusal.json").exists()


def _without_a_group(rank: int, ranks: int, job: Job) -> str:
    with pytest.MonkeyPatch.context() as patch:
        between_batches(patch, lambda _: torch.distributed.destroy_process_group(), step=ASKED)
        with pytest.raises(RuntimeError) as raised:
            run(job, RankInfo(rank, ranks, "cpu", rank))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{Path(job.run).parent}/again", rank=rank, world_size=ranks
    )
    return str(raised.value)


@pytest.mark.parametrize(
    ("said", "reason"), [("SIGTERM", "asked to stop by SIGTERM"), ("", "asked to stop")]
)
def test_a_run_that_stopped_says_who_asked(job: Job, said: str, reason: str) -> None:
    (Path(job.run) / "stop").write_text(said)
    assert run(job, RankInfo()) is None
    stopped = events(Path(job.run))[-1]
    assert stopped["reason"] == reason
    assert Translation().tags(stopped) == {"spiketrain.stopped": reason}
