"""When a run is saved: at the steps that the recipe names, on request, and before a machine is
taken away.

Between two batches rank 0 decides for all ranks, so that all ranks save after the same step. During
an evaluation, which may be long, each rank looks for requests by itself. If one rank sees a
request, all ranks leave the evaluation.
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

import torch
from torch import Tensor

from pipeline.core.errors import Diverged
from pipeline.core.run_folder import RunFolder
from pipeline.track.events import Checkpoint, Preempted, Undeleted
from pipeline.train.assemble import TrainContext
from pipeline.train.checkpoint import SavedCheckpoint, weights_of
from pipeline.train.guards.replica_check import drifted
from pipeline.train.job import Notice
from pipeline.train.metadata import checkpoint_metadata
from pipeline.train.recovery import Rollback

# seconds; if more training than this is unsaved, it is saved before an evaluation
UNSAVED_S = 30.0
MARGIN_S = 2.0  # seconds between the expected end of the last save and its deadline


class SavingHooks:
    """Saves one attempt. Every method is collective unless it says otherwise.

    Checkpoints are written while training goes on. A checkpoint counts, and is journaled, once it
    is complete. As a context manager, it closes the checkpoints when an exception ends the attempt.

    Args:
        step: the number of batches before the attempt.
        state: returns the trainer's state for a checkpoint; collective.
    """

    def __init__(
        self, context: TrainContext, *, step: int, state: Callable[[], dict[str, Any]]
    ) -> None:
        self.context, self.state = context, state
        self.ranks, self.checkpoints = context.ranks, context.checkpoints
        self.files = RunFolder(context.job.run)
        self.leaving = frozenset[str]()  # machines that this rank knows will be taken away
        self.deadline = math.inf  # of the last save, on the monotonic clock
        # the last save that was begun, and its time
        self._last: dict[str, Any] = {"step": step}
        self._last_at = self._batch_began = time.monotonic()
        # seconds that training was stopped for the last save, and seconds until the last checkpoint
        # was complete, which rank 0 knows
        self._stall_s = self._write_s = 0.0
        # the requests that this rank looks for during an evaluation
        self._watched = (self.files.stop, self.files.save)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        """Not collective. A rollback still needs the other ranks (`newest_step`)."""
        if error is not None and not isinstance(error, Rollback):
            self._report(self.checkpoints.close(error))

    def between_batches(self, step: int, *, last: bool) -> bool:
        """Save if a save is due or requested. Else compare the replicas if that is due. Returns
        whether a stop is requested.

        `last`: the batch is the last of its epoch, and the epoch is saved after its evaluation. A
        request is answered before it, because it may not leave enough time for the evaluation.

        Raises:
            Rollback: the replicas differ.
        """
        recipe, now = self.context.recipe, time.monotonic()
        every, minutes = recipe.checkpoints.every, recipe.checkpoints.minutes
        # A batch and a save may take twice as long as before.
        work_s = 2 * (now - self._batch_began + self._write_s) + MARGIN_S
        # Each look is a request to the file server, so only rank 0 looks.
        looks = self.ranks.rank == 0
        save_asked = looks and self.files.save.exists()
        notice = self._notice() if save_asked else self.context.rank_info.notice()
        stop_asked, save_asked, is_late, has_failed, is_noticed, is_last_call = self.ranks.decide(
            looks and self.files.stop.exists(),
            save_asked,
            minutes > 0 and now - self._last_at > 60 * minutes,
            self.checkpoints.failed(),  # the current state is saved in its place
            self.is_new(notice),
            self.deadline - now < work_s,
        )
        self._report(self.checkpoints.done())
        if is_noticed:
            self.add_notice(self.ranks.broadcast_object(lambda: notice), step)
        if is_last_call:
            self.deadline = math.inf
        if stop_asked or save_asked or is_noticed or is_last_call:
            self.save(step, is_epoch_end_due=last)
            self._answer(step)
        elif not last and (is_late or has_failed or (every > 0 and step % every == 0)):
            self.save(step)
        elif not last and recipe.policy.replicas_every and step % recipe.policy.replicas_every == 0:
            self._compare_replicas(step)  # a save compares them, too
        self._batch_began = time.monotonic()
        return stop_asked

    def before_evaluation(self, step: int) -> None:
        """Save without a score if much training is unsaved or machines will be taken away."""
        self._watched = (self.files.stop, self.files.save)
        [is_due] = self.ranks.decide(
            time.monotonic() - self._last_at > UNSAVED_S
            or self.checkpoints.failed()
            or bool(self.leaving)
        )
        if is_due and self._last["step"] != step:
            self.save(step, is_epoch_end_due=True)

    def is_interrupted(self) -> bool:
        """Whether this rank sees a request to stop or to save in an evaluation. Not collective."""
        self._report(self.checkpoints.done())
        return self.is_new(self.context.rank_info.notice()) or any(
            file.exists() for file in self._watched
        )

    def in_evaluation(self, step: int) -> bool:
        """Save on a request, which may not leave enough time for the rest of the evaluation.
        Returns whether a stop is requested.
        """
        stop_asked = bool(self.ranks.max(torch.tensor(float(self.files.stop.exists()))))
        for notice in self.ranks.all_gather_object(self._notice()):
            if self.is_new(notice):
                self.add_notice(notice, step)
        if self._last["step"] != step:
            self.save(step, is_epoch_end_due=True)
        self._answer(step)
        if self.ranks.rank:
            # NFS may show another machine for a minute what rank 0 has deleted.
            self._watched = (self.files.stop,)
        return stop_asked

    def save(
        self, step: int, *, score: float | None = None, is_epoch_end_due: bool = False
    ) -> None:
        """Begin to write the state after `step` batches.

        Args:
            score: of the evaluation after these batches.
            is_epoch_end_due: an epoch has ended, and the attempt that continues from here has to
                evaluate it.

        Raises:
            Rollback: the replicas differ.
            Diverged: weights that are not finite.
        """
        with self.context.meters.between("checkpoint"):
            self._save(step=step, score=score, is_epoch_end_due=is_epoch_end_due)
        self._batch_began = time.monotonic()

    def wait(self, step: int) -> None:
        """Wait until the checkpoint that is being written is complete. If it is the checkpoint of
        `step` and is lost, it is written once more.
        """
        with self.context.meters.between("checkpoint"):
            while True:
                began = time.monotonic()
                saved, is_lost = self.checkpoints.settle()
                self._stall_s += time.monotonic() - began
                stall_s = self._stall_s
                self._report(saved)
                if not is_lost or self._last["step"] != step:
                    return
                self._save(**self._last)  # `settle` raises if this one is lost, too
                self._stall_s += stall_s

    def newest_step(self) -> int:
        """The step of the newest checkpoint. Waits until the checkpoint that is being written is
        complete or lost.
        """
        saved, _ = self.checkpoints.settle()
        self._report(saved)
        return self.checkpoints.newest_step

    def is_new(self, notice: Notice | None) -> bool:
        """Whether a notice names a machine that no earlier notice has named. Not collective."""
        return notice is not None and not self.leaving.issuperset(notice.machines)

    def add_notice(self, notice: Notice | None, step: int) -> None:
        """Note and journal that machines will be taken away. The earliest deadline counts."""
        assert notice is not None, "it is new"
        self.leaving |= frozenset(notice.machines)
        left_s = None
        if notice.deadline is not None:
            left_s = notice.deadline - time.time()
            self.deadline = min(self.deadline, time.monotonic() + left_s)
        self.context.tracker.write(
            Preempted(step=step, machines=list(notice.machines), seconds_left=left_s)
        )

    def _notice(self) -> Notice | None:
        """The notice that reached this rank, or the one that a request to save holds."""
        notice = self.context.rank_info.notice()
        with suppress(OSError, ValueError, KeyError, TypeError):  # gone, or written by hand
            value = json.loads(self.files.save.read_text())
            if notice is None and value["machines"]:
                notice = Notice(tuple(value["machines"]), value["deadline"])
        return notice

    def _answer(self, step: int) -> None:
        """Delete the request once the checkpoint is complete. Its author then ends the workers."""
        self.wait(step)
        if self.ranks.rank == 0:
            self.files.save.unlink(missing_ok=True)

    def _save(self, **this: Any) -> None:
        began, context, network = time.monotonic(), self.context, self.context.backend.network
        if context.recipe.policy.replicas_every:
            self._compare_replicas(this["step"])  # a checkpoint holds the weights of one rank
        self.ranks.all_or_raise(lambda: self._check_finite(this["step"]))
        trainer = checkpoint_metadata(context, **this, state=self.state())
        with context.published():
            weights = weights_of(network) if self.ranks.rank == 0 else None
        with self.ranks.averaged_buffers(network) as buffers:
            self._report(
                self.checkpoints.save(
                    this["step"],
                    context.backend,
                    context.rule,
                    trainer,
                    buffers=buffers,
                    weights=weights,
                )
            )
        self._last, self._last_at = this, time.monotonic()
        self._stall_s = self._last_at - began  # includes the wait for the previous checkpoint

    def _compare_replicas(self, step: int) -> None:
        if ranks := drifted(self._replicated(), self.ranks):
            raise Rollback(
                step - 1,
                f"what workers {', '.join(map(str, ranks))} have learnt is not what others have",
                skips=False,
            )

    def _check_finite(self, step: int) -> None:
        # Minimum and maximum are NaN if a number is NaN. Each device is waited for once.
        extremes: dict[torch.device, list[Tensor]] = {}
        for value in self._replicated():
            if value.is_floating_point() and value.numel():
                extreme = torch.stack(value.detach().aminmax()).double()
                extremes.setdefault(value.device, []).append(extreme)
        if not all(bool(torch.cat(parts).isfinite().all()) for parts in extremes.values()):
            raise Diverged(
                "training: weights and what the rule learnt must be finite to be saved; they are"
                f" not after step {step}: {self.context.recipe.remedy}"
            )

    def _replicated(self) -> list[Tensor]:
        """The values that are the same on every rank, bit for bit: weights, an average of them, and
        the rule's buffers.
        """
        return [*self.context.backend.replicated(), *self.context.rule.buffers()]

    def _report(self, saved: SavedCheckpoint | None) -> None:
        if saved is None:
            return
        self._write_s = saved.write_s
        self.context.tracker.write(
            Checkpoint(
                step=saved.step,
                path=saved.address,
                stall_s=self._stall_s,
                write_s=saved.write_s,
                bytes=saved.bytes,
            )
        )
        if saved.prune_error:
            self.context.tracker.write(Undeleted(step=saved.step, error=saved.prune_error))
