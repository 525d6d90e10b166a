"""When a run saves, and for whom: where it is time, for whoever asks, and ahead of the departure of
a machine.

Between two batches rank 0 decides and tells the others, so that all of them save after the same
step. In an evaluation, which may be long, each rank looks up by itself, and all leave it for
whatever one of them has seen.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.core.errors import Diverged
from pipeline.core.run_folder import RunFolder
from pipeline.track.events import Checkpoint, Preempted, Undeleted
from pipeline.train.checkpoint import Saved, weights_of
from pipeline.train.context import TrainContext
from pipeline.train.evaluate_tasks import published
from pipeline.train.guards.anomaly import Guard, Rollback
from pipeline.train.guards.preemption import Departures
from pipeline.train.guards.replica_check import drifted
from pipeline.train.job import Notice, was_stopped
from pipeline.train.metadata import told_in_checkpoint
from pipeline.train.rule_metrics import Figures
from pipeline.train.tasks import Learnt

UNSAVED_S = 30.0
"""of training that an evaluation, however long, may leave unsaved: what is older is saved before
it
"""


@dataclass(frozen=True)
class _Begun:
    """A save that was begun."""

    step: int
    score: float | None = None
    owes: bool = False


class Saving:
    """Of one attempt, which begins before `step`; every rank asks its own equally often.

    `learnt`, `guard` and `figures` are told in each checkpoint, as they are by then.
    """

    def __init__(
        self, parts: TrainContext, *, step: int, learnt: Learnt, guard: Guard, figures: Figures
    ) -> None:
        self.parts, self.learnt, self.guard, self.figures = parts, learnt, guard, figures
        self.ranks, self.checkpoints, self.meters = parts.ranks, parts.checkpoints, parts.meters
        self.folder = Path(parts.job.run)
        self.files = RunFolder(self.folder)
        self.departures = Departures()
        self._begun, self._begun_at = _Begun(step), time.monotonic()
        """the last save, and when"""
        self._stall_s = 0.0
        """that training has stood still for the last save, `_save` and whatever it was waited
        for
        """
        self._write_s = 0.0
        """that the last checkpoint took until it was whole; known to rank 0"""
        self._trains_since = time.monotonic()
        """when a batch last began, for all that is known here"""
        self._heeded = (self.files.stop, self.files.save)
        """the files by which somebody asks, that this rank looks for in an evaluation"""

    def between_batches(self, step: int, *, last: bool) -> bool:
        """Save where it is time or somebody asks, or compare the replicas; collective. Whether
        somebody asks to stop.

        `last`: of an epoch, which is saved after its evaluation. Who asks may not have the time for
        that.

        Raises:
            Rollback: the replicas have come apart.
        """
        recipe = self.parts.recipe
        due = recipe.checkpoints.every > 0 and step % recipe.checkpoints.every == 0
        batch_s = time.monotonic() - self._trains_since
        # Rank 0 decides, so it alone looks for files on shared storage: each look is a question to
        # the file server.
        looks = self.ranks.rank == 0
        is_asked = looks and self.files.save.exists()
        notice = self._notice() if is_asked else self.parts.notice()
        stops, asked, late, failed, noticed, leaves = self.ranks.decide(
            looks and was_stopped(self.folder),
            is_asked,
            recipe.checkpoints.minutes > 0
            and time.monotonic() - self._begun_at > 60 * recipe.checkpoints.minutes,
            self.checkpoints.failed(),  # the state at hand is saved in its place
            self.departures.is_new(notice),
            self.departures.is_last_call(batch_s=batch_s, write_s=self._write_s),
        )
        self._tell_saved(self.checkpoints.done())
        if noticed:
            self._hear(self.ranks.broadcast_object(lambda: notice), step)
        if leaves:
            self.departures.saved()
        if stops or asked or noticed or leaves:
            self.save(step, score=None, owes=last)
            self._answer(step)
        elif (due or late or failed) and not last:
            self.save(step, score=None)
        elif (
            recipe.policy.replicas_every and step % recipe.policy.replicas_every == 0 and not last
        ):  # whoever saves compares
            self._compare_replicas(step)
        self._trains_since = time.monotonic()
        return stops

    def before_evaluation(self, step: int) -> None:
        """Save without a score where much would be lost with the workers, or where they may not be
        there for long; collective.
        """
        self._heeded = (self.files.stop, self.files.save)
        is_old = time.monotonic() - self._begun_at > UNSAVED_S
        [is_due] = self.ranks.decide(
            is_old or self.checkpoints.failed() or bool(self.departures.machines)
        )
        if is_due:
            self._save_without_score(step)

    def is_asked(self) -> bool:
        """In an evaluation: whether this rank sees that somebody asks to stop or to save; asks no
        other.
        """
        self._tell_saved(self.checkpoints.done())
        return any(file.exists() for file in self._heeded) or self.departures.is_new(
            self.parts.notice()
        )

    def in_evaluation(self, step: int) -> bool:
        """Save for whoever asks, and may not have the time for the rest of it; collective. Whether
        somebody asks to stop.
        """
        stops = bool(
            self.ranks.max(torch.tensor(float(was_stopped(self.folder))))
        )  # whoever sees it first
        for notice in self.ranks.all_gather_object(self._notice()):
            if self.departures.is_new(notice):
                self._hear(notice, step)
        self._save_without_score(step)
        self._answer(step)
        if self.ranks.rank:
            # NFS may show another machine for a minute what rank 0 has deleted.
            self._heeded = (self.files.stop,)
        return stops

    def save(self, step: int, *, score: float | None, owes: bool = False) -> None:
        """Begin to write what there is after `step` steps; collective.

        `score` is that of its evaluation; `owes`: an epoch has ended, and its evaluation is left to
        whoever goes on from there.

        Raises:
            Rollback: the replicas have come apart.
            Diverged: weights that are not finite.
        """
        with self.meters.between("checkpoint"):
            self._save(_Begun(step, score, owes))
        self._trains_since = time.monotonic()

    def wait(self, step: int) -> None:
        """The one that is being written counts from here on, or one in its place; collective."""
        with self.meters.between("checkpoint"):
            with self._standing_still():
                saved, is_lost = self.checkpoints.settle()
            self._tell_saved(saved)
            if is_lost and self._begun.step == step:
                lost_s = self._stall_s
                self._save(self._begun)
                self._stall_s += lost_s
                with self._standing_still():
                    saved = self.checkpoints.wait()
                self._tell_saved(saved)

    def newest_step(self) -> int:
        """Behind which the newest checkpoint stands, once the one that is being written is whole or
        lost; collective.
        """
        saved, _ = self.checkpoints.settle()  # the state at hand is none to save
        self._tell_saved(saved)
        return self.checkpoints.newest_step

    def discard(self, step: int, reason: str) -> None:
        """Nobody goes back to what there is after `step` steps; collective."""
        self.newest_step()  # once nothing is being written
        self.checkpoints.discard(step, reason)

    def close(self, error: BaseException) -> None:
        """Come to an end by `error`, without the other ranks."""
        self._tell_saved(self.checkpoints.close(error))

    # -------------------------------------------------------------------------------------- notices

    def _notice(self) -> Notice | None:
        """What this rank has heard, or can read from whoever asks for a save and was told first."""
        return self.parts.notice() or Notice.in_file(self.files.save)

    def _hear(self, notice: Notice | None, step: int) -> None:
        assert notice is not None, "it is new"
        self.departures.add(notice)
        self.parts.tracker.write(
            Preempted(step=step, machines=list(notice.machines), seconds_left=notice.seconds_left)
        )

    # ---------------------------------------------------------------------------------------- saves

    def _save_without_score(self, step: int) -> None:
        if self._begun.step != step:
            self.save(step, score=None, owes=True)

    def _answer(self, step: int) -> None:
        self.wait(step)
        if self.ranks.rank == 0:
            self.files.save.unlink(
                missing_ok=True
            )  # whoever asked ends the workers as soon as it is gone

    def _save(self, this: _Begun) -> None:
        """Training stands still meanwhile: for the one before, where it is not whole yet, and for
        all that is done here.
        """
        began, parts = time.monotonic(), self.parts
        if parts.recipe.policy.replicas_every:
            self._compare_replicas(this.step)  # a checkpoint holds those of one rank
        self.ranks.all_or_raise(lambda: self._check_finite(this.step))
        totals = self.meters.over_ranks(self.ranks.max, self.ranks.mean)
        about = {
            "score": this.score,
            "owes": this.owes,
            "totals": totals,
            "figures": self.figures.now(),
        }
        trainer = told_in_checkpoint(
            parts, step=this.step, learnt=self.learnt, guard=self.guard.told(), **about
        )
        with published(parts):
            weights = weights_of(parts.backend.network) if self.ranks.rank == 0 else None
        with self.ranks.averaged(parts.backend.network) as buffers:
            state = {"buffers": buffers, "weights": weights}
            self._tell_saved(
                self.checkpoints.save(this.step, parts.backend, parts.rule, trainer, **state)
            )
        self._begun, self._begun_at = this, time.monotonic()
        self._stall_s = self._begun_at - began

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._stall_s += time.monotonic() - began

    def _compare_replicas(self, step: int) -> None:
        """Ranks that have come apart learn nothing together: all begin again with what they last
        agreed on.
        """
        if apart := drifted(self._replicated(), self.ranks):
            raise Rollback(
                step - 1,
                f"what workers {', '.join(map(str, apart))} have learnt is not what others have",
                skips=False,
            )

    def _check_finite(self, step: int) -> None:
        if not _are_finite(self._replicated()):
            raise Diverged(
                "training: weights and what the rule learnt must be finite to be saved; they are"
                f" not after step {step}: {self.parts.recipe.remedy}"
            )

    def _replicated(self) -> list[Tensor]:
        """What every rank holds alike, bit for bit: weights, an average of them, and what the rule
        learnt.
        """
        return [*self.parts.backend.replicated(), *self.parts.rule.buffers()]

    def _tell_saved(self, saved: Saved | None) -> None:
        if saved is not None:
            self._write_s = saved.write_s
            tracker = self.parts.tracker
            tracker.write(
                Checkpoint(
                    step=saved.step,
                    path=saved.address,
                    stall_s=self._stall_s,
                    write_s=saved.write_s,
                    bytes=saved.bytes,
                )
            )
            if saved.untidy:
                tracker.write(Undeleted(step=saved.step, error=saved.untidy))


def _are_finite(values: Iterable[Tensor]) -> bool:
    """Whether all numbers in them are: then their least and greatest are, and one that is NaN is
    both. A device is asked once.
    """
    found: dict[torch.device, list[Tensor]] = {}
    for value in values:
        if value.is_floating_point() and value.numel():
            found.setdefault(value.device, []).append(
                torch.stack(value.detach().aminmax()).double()
            )
    return all(bool(torch.cat(extremes).isfinite().all()) for extremes in found.values())
