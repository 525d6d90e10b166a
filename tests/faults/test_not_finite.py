"""Runs that meet batches which are not finite, or a loss that leaps as one batch of garbage makes
it: skipped, gone back for, given up; the bits are those of a run that was told so.
"""

import json
import math
import random
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.errors import Diverged, remedy
from pipeline.recipe.recipe import Policy, spec
from pipeline.rules.ottt import OTTT
from pipeline.spiking.encode import to_time_first
from pipeline.track.run_state import state_of
from pipeline.train import checkpointing, trainer, worker
from pipeline.train.checkpointing import SavingHooks
from pipeline.train.guards import anomaly
from pipeline.train.job import Job, RankInfo
from pipeline.train.recovery import Decisions
from pipeline.train.trainer import Trainer
from tests.helpers.interruptions import change_losses, newest
from tests.helpers.processes import run_ranks
from tests.helpers.small import (
    events,
    make_run,
    same_weights,
    small_recipe,
    steps_of,
    train_inline,
)

REASON = "its gradient is not finite on 1 of 1 worker"  # spikes hide it from the loss
pytestmark = pytest.mark.timeout(120)

SEED = 20261127  # of the batches
STEPS = 16


def hit(patch: pytest.MonkeyPatch, steps: Collection[int]) -> None:
    """These batches hold no numbers, whenever they are read."""
    original = Trainer._micro_batches

    def micro_batches(self: Trainer, source: Any) -> Any:
        for batch in original(self, source):
            nothing_TB = to_time_first(
                batch.x_TB[0] * math.nan, len(batch.x_TB)
            )  # a still image on this rank as on the others
            yield batch._replace(x_TB=nothing_TB) if self.step in steps else batch

    patch.setattr(Trainer, "_micro_batches", micro_batches)


def assert_as_told(run: Path, first: int, end: int, **changes: Any) -> None:
    """The run has the bits of one that meets nothing and was told to pass over these batches."""
    policy = replace(changes.pop("policy", Policy()), skip=((first, end),))
    train_inline(run.with_name("told"), small_recipe(policy=policy, **changes))
    assert same_weights(run, run.with_name("told"))


@pytest.mark.parametrize(
    ("seed", "batches", "changes"),
    [
        (0, 1, {}),
        (1, 4, {"policy": Policy(max_skips=3)}),
        # A rule that moves the weights at once goes back at the first.
        (2, 1, {"rule": spec(OTTT, update="step")}),
    ],
    ids=["one", "several in a row", "one of a rule that moves the weights at once"],
)
def test_one_is_skipped_and_several_lead_back_to_the_checkpoint_and_around_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    batches: int,
    changes: dict[str, Any],
) -> None:
    run, first = tmp_path / "hit", random.Random(SEED + seed).randrange(1, STEPS - 3)
    last, to = first + batches - 1, newest(first + batches - 1)
    with monkeypatch.context() as patch:
        hit(patch, range(first, last + 1))
        summary = train_inline(run, small_recipe(**changes))
    assert summary is not None
    back = [
        (each["step"], each["to"], each["reason"], each["advice"])
        for each in events(run, "rollback")
    ]
    advice = "lower optimizer.lr (0.1) or set clip_norm=1.0"
    if changes:
        assert back == [(last, to, REASON, advice)]
        assert Decisions.read(run) == Decisions(1, ((to, last + 1),))
        assert steps_of(run, "start") == [0, to]
    else:
        [skipped] = events(run, "skipped")
        about = {"step": first, "epoch": first // 8, "samples": 8}
        assert skipped.items() >= {**about, "reason": REASON, "advice": advice}.items()
        assert back == []
    assert [summary[name] for name in ("rollbacks", "restarts", "skipped_batches")] == [
        len(back),
        len(back),
        last + 1 - (to if "rule" in changes else first),
    ]
    assert_as_told(run, to if "rule" in changes else first, last + 1, **changes)


@pytest.mark.parametrize("max_skips", [1, pytest.param(0, marks=pytest.mark.full)])
def test_a_loss_that_leaps_is_passed_over_or_gone_back_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_skips: int
) -> None:
    window, run = 12, tmp_path / "hit"  # a loss is compared with fewer than usual, which saves time
    step = random.Random(SEED).randrange(window + 2, window + 10)
    monkeypatch.setattr(anomaly, "WINDOW", window)
    policy = Policy(loss_spike=10.0, max_skips=max_skips)
    changes = {"epochs": 12, "stop_after": window + 12, "policy": policy}
    with monkeypatch.context() as patch:
        # Its gradient is a hundred times what it should be, too.
        change_losses(patch, lambda at, loss: loss * (100.0 if at == step else 1.0))
        train_inline(run, small_recipe(**changes))
    [event] = events(run, "skipped" if max_skips else "rollback")
    first = step if max_skips else event["to"]
    if not max_skips:
        assert Decisions.read(run) == Decisions(1, ((first, step + 1),))
    assert "is more than 10 times the median" in event["reason"]
    assert_as_told(run, first, step + 1, **changes)


@pytest.mark.parametrize("is_saved_before", [False, True])
def test_it_never_goes_back_to_a_checkpoint_whose_evaluation_was_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_saved_before: bool
) -> None:
    run, found = tmp_path / "run", []
    evaluate_tasks, note_rollback = trainer.evaluate_tasks, worker._note_rollback

    def evaluate(context: Any, *, step: int, **about: Any) -> Any:
        evaluated = evaluate_tasks(context, step=step, **about)
        if step != 8 or evaluated is None:
            return evaluated
        return [each._replace(result=replace(each.result, loss=math.nan)) for each in evaluated]

    def noted(*about: Any) -> None:
        note_rollback(*about)
        found.append(max((run / "checkpoints").glob("step_*")).name)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate_tasks", evaluate)
        patch.setattr(worker, "_note_rollback", noted)
        if is_saved_before:  # a long evaluation is preceded by a checkpoint without a score
            patch.setattr(checkpointing, "MAX_UNSAVED_S", 0.0)
        said = r"batch 7 \(epoch 1\): the loss of the next evaluation is nan; .* lower optimizer"
        with pytest.raises(Diverged, match=said):
            train_inline(run, small_recipe(policy=Policy(max_rollbacks=1)))
    assert [event["to"] for event in events(run, "rollback")] == [6]
    assert [*found, max((run / "checkpoints").glob("step_*")).name] == ["step_00000006"] * 2
    assert not events(run, "evaluation")  # no score to be best by
    assert [event["reason"] for event in events(run, "quarantine")] == [
        "the loss of the next evaluation is nan"
    ] * 2 * is_saved_before
    train_inline(run, small_recipe(policy=Policy(max_rollbacks=2)))  # it goes on from there
    assert steps_of(run, "start") == [0, 6, 6]


def test_what_to_change_names_the_settings_that_are_there() -> None:
    assert small_recipe(clip_norm=2.0).remedy == "lower optimizer.lr (0.1) or clip_norm (2)"
    assert remedy(None, None) == "lower the learning rate or set clip_norm=1.0"


@pytest.mark.distributed
@pytest.mark.parametrize("zero", [pytest.param(1, marks=pytest.mark.full), 2])
def test_where_zero_holds_the_gradients_it_is_seen_all_the_same(tmp_path: Path, zero: int) -> None:
    """What one of two ranks met leads both back; at ZeRO-2 no rank has gradients of its own
    (deepspeed 0.19.8).

    Each keeps half of the momentum, and the summary tells what a worker without ZeRO would keep.
    """
    step = random.Random(SEED + zero).randrange(3, STEPS)
    hit = small_recipe(backend="deepspeed", zero=zero)
    told = replace(hit, policy=Policy(skip=((newest(step), step + 1),)))
    jobs = [make_run(tmp_path / name, made) for name, made in (("hit", hit), ("told", told))]
    (tmp_path / "meeting").mkdir()
    run_ranks(_one_is_hit, 2, tmp_path / "meeting", *jobs, step)
    [back] = events(tmp_path / "hit", "rollback")
    assert (back["step"], back["to"]) == (step, newest(step))
    assert back["reason"].startswith("its gradient is not finite on ")
    assert same_weights(tmp_path / "hit", tmp_path / "told")
    held = json.loads((tmp_path / "told" / "summary.json").read_text())["held"]
    # DeepSpeed fills each part up to a round number.
    assert held["gradients"] <= held["optimizer"] < 1.1 * held["gradients"]


def _one_is_hit(rank: int, ranks: int, meets: Job, told: Job, step: int) -> None:
    for job, steps in ((meets, {step} if rank else set()), (told, set())):
        with pytest.MonkeyPatch.context() as patch:
            hit(patch, steps)
            worker.run(job, RankInfo(rank, ranks, "cpu", rank))


def test_at_the_end_of_the_ladder_it_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of two in a row the first is skipped, once more after going back; a checkpoint between them
    # would remember it.
    places = [step for step in range(1, STEPS - 4) if newest(step + 1) != step + 1]
    run, first = tmp_path / "hit", random.Random(SEED + 3).choice(places)
    hit(monkeypatch, range(first, 100))
    said = (
        rf"training: batch {first + 3} \(epoch {(first + 3) // 8 + 1}\): {REASON}; all rollbacks"
        r" of max_rollbacks=1 are used; lower optimizer.lr \(0.1\) or set clip_norm=1.0$"
    )
    with pytest.raises(Diverged, match=said):
        train_inline(run, small_recipe(policy=Policy(max_skips=1, max_rollbacks=1)))
    assert (state_of(run), Decisions.read(run).rollbacks) == ("diverged", 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy.skip": ((3, 3),)}, "recipe: policy.skip must be pairs of batches"),
        ({"policy.skip": ((-1, 3),)}, "recipe: policy.skip must be pairs of batches"),
        ({"policy.loss_spike": 0.5}, "recipe: policy.loss_spike must be 0 or above 1; got 0.5"),
        ({"policy.max_skips": -1}, "recipe: policy.max_skips must be at least 0; got -1"),
    ],
)
def test_a_ladder_without_rungs_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small_recipe().override(changes)


@pytest.mark.distributed
def test_weights_that_are_not_finite_on_one_rank_end_all(tmp_path: Path) -> None:
    # Else the other's weights come back.
    job = make_run(
        tmp_path / "run", small_recipe(backend="deepspeed", policy=Policy(replicas_every=0))
    )
    said = (
        "training: weights and the rule's buffers must be finite in a checkpoint; they are not"
        " after step 3: lower optimizer.lr (0.1) or set clip_norm=1.0 (worker 1)"
    )
    assert run_ranks(_damaged_on_one, 2, tmp_path, job) == [said, said]


def _damaged_on_one(rank: int, ranks: int, job: Job) -> str:
    save = SavingHooks.save

    def damaged(self: SavingHooks, step: int, **about: Any) -> None:
        if rank == 1:
            next(self.context.backend.network.parameters()).data.fill_(torch.nan)
        save(self, step, **about)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SavingHooks, "save", damaged)
        with pytest.raises(Diverged) as told:
            worker.run(job, RankInfo(rank, ranks))
    return str(told.value)
