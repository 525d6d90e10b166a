"""Runs that meet batches which are not finite: skipped, gone back for, given up; the bits are those
of a run that was told so.
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
from pipeline.recipe.recipe import Checkpointing, Policy, Recipe, spec
from pipeline.rules.ottt import OTTT
from pipeline.spiking.encode import over_steps
from pipeline.track.state import state_of
from pipeline.train import checkpointing, trainer, worker
from pipeline.train.checkpointing import Saving
from pipeline.train.job import Job, RankInfo
from pipeline.train.recovery import Decisions
from pipeline.train.trainer import Trainer
from pipeline.train.worker import run
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
CHECKPOINTS = sorted(
    {*range(0, STEPS + 1, 3), *range(0, STEPS + 1, 8)}
)  # checkpoints.every, and each epoch's end


def newest(step: int) -> int:
    """The checkpoint that batch `step` finds."""
    return max(each for each in CHECKPOINTS if each <= step)


def hit(patch: pytest.MonkeyPatch, steps: Collection[int]) -> None:
    """These batches hold no numbers, whenever they are read."""
    original = Trainer._micro_batches

    def micro_batches(self: Trainer, source: Any) -> Any:
        for batch in original(self, source):
            nothing_TB = over_steps(
                batch.x_TB[0] * math.nan, len(batch.x_TB)
            )  # a still image on this rank as on the others
            yield batch._replace(x_TB=nothing_TB) if self.step in steps else batch

    patch.setattr(Trainer, "_micro_batches", micro_batches)


def recipe(**changes: Any) -> Recipe:
    return small_recipe(epochs=2, checkpoints=Checkpointing(every=3), **changes)


def told(run: Path, skip: tuple[tuple[int, int], ...], **changes: Any) -> Path:
    """The run that meets nothing and was told to pass over the same batches."""
    train_inline(run, recipe(policy=Policy(skip=skip), **changes))
    return run


def test_one_is_skipped_and_the_rest_is_as_if_it_had_been_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = random.Random(SEED).randrange(STEPS)
    with monkeypatch.context() as patch:
        hit(patch, {step})
        summary = train_inline(tmp_path / "hit", recipe())
    assert same_weights(tmp_path / "hit", told(tmp_path / "told", ((step, step + 1),)))
    [skipped] = events(tmp_path / "hit", "skipped")
    assert (skipped["step"], skipped["reason"], skipped["samples"]) == (
        step,
        REASON,
        recipe().batch_size,
    )
    assert (skipped["epoch"], skipped["advice"]) == (
        step // 8,
        "lower optimizer.lr (0.1) or set clip_norm=1.0",
    )
    assert summary is not None
    assert (summary["skipped_batches"], summary["rollbacks"]) == (1, 0)


def test_several_in_a_row_lead_back_to_the_checkpoint_and_around_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = random.Random(SEED + 1).randrange(STEPS - 3)
    last, to = first + 3, newest(first + 3)
    with monkeypatch.context() as patch:
        hit(patch, range(first, last + 1))
        summary = train_inline(tmp_path / "hit", recipe(policy=Policy(max_skips=3)))
    [back] = events(tmp_path / "hit", "rollback")
    assert (back["step"], back["to"], back["reason"]) == (last, to, REASON)
    assert back["advice"].startswith("lower optimizer.lr (0.1)")
    assert Decisions.read(tmp_path / "hit") == Decisions(1, ((to, last + 1),))
    assert steps_of(tmp_path / "hit", "start") == [0, to]
    assert same_weights(tmp_path / "hit", told(tmp_path / "told", ((first, last + 1),)))
    assert summary is not None
    assert (summary["skipped_batches"], summary["rollbacks"], summary["restarts"]) == (4, 1, 1)


def answers_nothing(patch: pytest.MonkeyPatch, steps: Collection[int]) -> None:
    """Evaluations after these steps have a loss that is not finite, though all weights are."""
    original = trainer.evaluate_tasks

    def evaluate(context: Any, *, step: int, **about: Any) -> Any:
        found = original(context, step=step, **about)
        if step not in steps or found is None:
            return found
        return [each._replace(result=replace(each.result, loss=math.nan)) for each in found]

    patch.setattr(trainer, "evaluate_tasks", evaluate)


@pytest.mark.parametrize("is_saved_before", [False, True])
def test_it_never_goes_back_to_a_checkpoint_whose_evaluation_was_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_saved_before: bool
) -> None:
    run, end, found = tmp_path / "run", 8, []
    checkpoints = run / "checkpoints"
    with monkeypatch.context() as patch:
        answers_nothing(patch, {end})
        if is_saved_before:  # a long evaluation is preceded by a checkpoint without a score
            patch.setattr(checkpointing, "UNSAVED_S", 0.0)
        original = worker._note_rollback

        def noted(*about: Any) -> None:
            original(*about)
            found.append(checkpoint_steps(checkpoints))

        patch.setattr(worker, "_note_rollback", noted)
        with pytest.raises(
            Diverged,
            match=(
                r"batch 7 \(epoch 1\): the loss of the evaluation after it is nan; .* lower"
                r" optimizer"
            ),
        ):
            train_inline(run, recipe(policy=Policy(max_rollbacks=1)))
    assert [event["to"] for event in events(run, "rollback")] == [6]
    assert [steps[-1] for steps in found] == [6] and checkpoint_steps(checkpoints)[-1] == 6
    assert not events(run, "evaluation")  # no score to be best by
    quarantined = [event["reason"] for event in events(run, "quarantine")]
    assert quarantined == ["the loss of the evaluation after it is nan"] * 2 * is_saved_before
    train_inline(run, recipe(policy=Policy(max_rollbacks=2)))  # resumed, it goes on from there
    assert steps_of(run, "start") == [0, 6, 6]


def checkpoint_steps(folder: Path) -> list[int]:
    return sorted(int(each.name.removeprefix("step_")) for each in folder.glob("step_*"))


def test_what_to_change_names_the_settings_that_are_there() -> None:
    assert small_recipe(clip_norm=2.0).remedy == "lower optimizer.lr (0.1) or clip_norm (2)"
    assert remedy(None, None) == "lower the learning rate or set clip_norm=1.0"


def test_a_rule_that_moves_the_weights_at_once_goes_back_at_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, step = (
        {"rule": spec(OTTT, update="step")},
        random.Random(SEED + 2).randrange(1, STEPS),
    )
    with monkeypatch.context() as patch:
        hit(patch, {step})
        train_inline(tmp_path / "hit", recipe(**rule))
    assert [event["to"] for event in events(tmp_path / "hit", "rollback")] == [newest(step)]
    assert same_weights(
        tmp_path / "hit", told(tmp_path / "told", ((newest(step), step + 1),), **rule)
    )


@pytest.mark.distributed
@pytest.mark.parametrize("zero", [pytest.param(1, marks=pytest.mark.full), 2])
def test_where_zero_holds_the_gradients_it_is_seen_all_the_same(tmp_path: Path, zero: int) -> None:
    """What one of two ranks met leads both back; at ZeRO-2 no rank has gradients of its own
    (deepspeed 0.19.8).

    Each keeps half of the momentum, and the summary tells what a worker without ZeRO would keep.
    """
    step = random.Random(SEED + zero).randrange(3, STEPS)
    told = recipe(backend="deepspeed", zero=zero, policy=Policy(skip=((newest(step), step + 1),)))
    jobs = (
        make_run(tmp_path / "hit", replace(told, policy=Policy(skip=()))),
        make_run(tmp_path / "told", told),
    )
    (tmp_path / "meeting").mkdir()
    run_ranks(_one_is_hit, 2, tmp_path / "meeting", *jobs, step)
    [back] = events(tmp_path / "hit", "rollback")
    assert (back["step"], back["to"]) == (step, newest(step)) and back["reason"].startswith(
        "its gradient is not finite on "
    )
    assert same_weights(tmp_path / "hit", tmp_path / "told")
    held = json.loads((tmp_path / "told" / "summary.json").read_text())["held"]
    assert (
        held["gradients"] <= held["optimizer"] < 1.1 * held["gradients"]
    )  # DeepSpeed fills each part up to a round number


def _one_is_hit(rank: int, ranks: int, meets: Job, told: Job, step: int) -> None:
    for job, steps in ((meets, {step} if rank else set()), (told, set())):
        with pytest.MonkeyPatch.context() as patch:
            hit(patch, steps)
            run(job, RankInfo(rank, ranks, "cpu", rank))


def test_at_the_end_of_the_ladder_it_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of two in a row the first is skipped, once more after going back; a checkpoint between them
    # would remember it.
    first = random.Random(SEED + 3).choice(
        [step for step in range(1, STEPS - 4) if step + 1 not in CHECKPOINTS]
    )
    with monkeypatch.context() as patch:
        hit(patch, range(first, 100))
        with pytest.raises(
            Diverged,
            match=(
                rf"training: batch {first + 3} \(epoch {(first + 3) // 8 + 1}\): {REASON}; it has"
                r" gone back max_rollbacks=1 "
                r"times; lower optimizer.lr \(0.1\) or set clip_norm=1.0$"
            ),
        ):
            train_inline(tmp_path / "hit", recipe(policy=Policy(max_skips=1, max_rollbacks=1)))
    assert (
        state_of(tmp_path / "hit") == "diverged" and Decisions.read(tmp_path / "hit").rollbacks == 1
    )


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
    job = make_run(
        tmp_path / "run", small_recipe(backend="deepspeed", policy=Policy(replicas_every=0))
    )  # else the other's weights come back
    said = (
        "training: weights and what the rule learnt must be finite to be saved; they are not after"
        " step 3: lower optimizer.lr (0.1) or set clip_norm=1.0 (worker 1)"
    )
    assert run_ranks(_damaged_on_one, 2, tmp_path, job) == [said, said]


def _damaged_on_one(rank: int, ranks: int, job: Job) -> str:
    save = Saving.save

    def damaged(self: Saving, step: int, **about: Any) -> None:
        if rank == 1:
            next(self.context.backend.network.parameters()).data.fill_(torch.nan)
        save(self, step, **about)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saving, "save", damaged)
        with pytest.raises(Diverged) as told:
            run(job, RankInfo(rank, ranks))
    return str(told.value)
