"""When a run is saved: at the steps and times that the recipe sets, after each epoch, on request,
and before a machine is taken away.

Between two batches rank 0 decides for all ranks, so that all of them save after the same step. An
evaluation may be long, so each rank looks for requests during it. If one rank sees a request, all
ranks leave the evaluation once each has finished or left its part.
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
from pipeline.train.backend.collectives import drifted
from pipeline.train.checkpoint import SavedCheckpoint, weights_of
from pipeline.train.job import Notice
from pipeline.train.metadata import checkpoint_metadata
from pipeline.train.recovery import Rollback

# If more seconds of training than this are unsaved, they are saved before an evaluation.
MAX_UNSAVED_S = 30.0
MARGIN_S = 2.0  # seconds between the expected end of the last save and its deadline


class SavingHooks:
    """Saves the state of an attempt. Public methods are collective unless they say otherwise.

    Checkpoints are written during training. A checkpoint is valid, and is journaled, once it is
    complete. After an exception other than `Rollback`, the context manager closes the checkpoints.

    Args:
        step: the step at which the attempt starts.
        state: returns the trainer's state for a checkpoint; collective.
    """

    def __init__(
        self, context: TrainContext, *, step: int, state: Callable[[], dict[str, Any]]
    ) -> None:
        self.context, self.state = context, state
        self.ranks, self.checkpoints = context.ranks, context.checkpoints
        self.files = RunFolder(context.job.run)
        self.leaving_machines = frozenset[str]()  # in the notices that this rank knows
        self.deadline = math.inf  # of the last save before machines leave, on the monotonic clock
        self._last_save: dict[str, Any] = {"step": step}  # the arguments of the last `_save`
        self._last_save_at = self._batch_began = time.monotonic()
        # _stall_s: how long the last save stopped the training
        # _write_s: `write_s` of the last checkpoint; known to rank 0
        self._stall_s = self._write_s = 0.0
        # the files of requests that this rank looks for during an evaluation
        self._request_files = (self.files.stop_request, self.files.save_request)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        """Not collective. A rollback leaves the checkpoints open for `newest_step`."""
        if error is not None and not isinstance(error, Rollback):
            self._report(self.checkpoints.close(error))

    def between_batches(self, step: int, *, last: bool) -> bool:
        """Save if a save is due or requested. Otherwise compare the replicas if that is due.
        Returns whether a stop is requested.

        `last`: the batch is the last of its epoch. `Trainer._end_epoch` then makes a save that is
        due. A requested save does not wait, because there may be no time for the evaluation.

        Raises:
            Rollback: the replicas differ.
            Diverged: the weights are not finite.
        """
        recipe, now = self.context.recipe, time.monotonic()
        every, minutes = recipe.checkpoints.every, recipe.checkpoints.minutes
        # A batch and a save may take twice as long as the last ones.
        work_s = 2 * (now - self._batch_began + self._write_s) + MARGIN_S
        # Only rank 0 looks for files, because each look is a request to the file server.
        looks = self.ranks.rank == 0
        save_requested = looks and self.files.save_request.exists()
        notice = self._notice() if save_requested else self.context.rank_info.notice()
        (
            stop_requested,
            save_requested,
            is_late,
            has_failed,
            has_new_notice,
            is_last_chance,
        ) = self.ranks.decide(
            looks and self.files.stop_request.exists(),
            save_requested,
            minutes > 0 and now - self._last_save_at > 60 * minutes,
            self.checkpoints.failed(),
            self.is_new(notice),
            self.deadline - now < work_s,
        )
        self._report(self.checkpoints.done())
        if has_new_notice:
            self.add_notice(self.ranks.broadcast_object(lambda: notice), step)
        if is_last_chance:
            self.deadline = math.inf
        if stop_requested or save_requested or has_new_notice or is_last_chance:
            self.save(step, is_epoch_end_due=last)
            self._fulfil_request(step)
        elif not last and (is_late or has_failed or (every > 0 and step % every == 0)):
            self.save(step)
        elif not last and recipe.policy.replicas_every and step % recipe.policy.replicas_every == 0:
            self._compare_replicas(step)  # a save compares them, too
        self._batch_began = time.monotonic()
        return stop_requested

    def before_evaluation(self, step: int) -> None:
        """Save without a score if much training is unsaved, the last save failed, or machines will
        be taken away. Do nothing if the last save was at `step`.
        """
        self._request_files = (self.files.stop_request, self.files.save_request)
        [is_due] = self.ranks.decide(
            time.monotonic() - self._last_save_at > MAX_UNSAVED_S
            or self.checkpoints.failed()
            or bool(self.leaving_machines)
        )
        if is_due and self._last_save["step"] != step:
            self.save(step, is_epoch_end_due=True)

    def is_interrupted(self) -> bool:
        """Whether this rank sees a request to stop or save, or a new notice, during an evaluation.
        Not collective.
        """
        self._report(self.checkpoints.done())
        return self.is_new(self.context.rank_info.notice()) or any(
            file.exists() for file in self._request_files
        )

    def save_in_evaluation(self, step: int) -> bool:
        """Save on a request during an evaluation, because there may be no time for the rest of it.
        Returns whether a stop is requested.
        """
        stop_requested = bool(self.ranks.max(torch.tensor(float(self.files.stop_request.exists()))))
        for notice in self.ranks.all_gather_object(self._notice()):
            if self.is_new(notice):
                self.add_notice(notice, step)
        if self._last_save["step"] != step:
            self.save(step, is_epoch_end_due=True)
        self._fulfil_request(step)
        if self.ranks.rank:
            # Over NFS, other machines may see the file for a minute after rank 0 deletes it.
            self._request_files = (self.files.stop_request,)
        return stop_requested

    def save(
        self, step: int, *, score: float | None = None, is_epoch_end_due: bool = False
    ) -> None:
        """Begin to write the state after `step` batches.

        Args:
            score: the score of the evaluation after these batches.
            is_epoch_end_due: `Trainer._end_epoch` of this step is not done. An attempt that
                continues from this checkpoint begins with it.

        Raises:
            Rollback: the replicas differ.
            Diverged: the weights are not finite.
        """
        with self.context.meters.between("checkpoint"):
            self._save(step=step, score=score, is_epoch_end_due=is_epoch_end_due)
        self._batch_began = time.monotonic()

    def wait(self, step: int) -> None:
        """Wait until the last checkpoint is complete. If it is the checkpoint of `step` and writing
        it fails, write it once more.
        """
        with self.context.meters.between("checkpoint"):
            while True:
                began = time.monotonic()
                saved, is_lost = self.checkpoints.settle()
                self._stall_s += time.monotonic() - began
                stall_s = self._stall_s
                self._report(saved)
                if not is_lost or self._last_save["step"] != step:
                    return
                self._save(**self._last_save)  # `settle` raises an error if this one fails, too
                self._stall_s += stall_s

    def newest_step(self) -> int:
        """Wait for the last save. Returns the step of the newest complete checkpoint."""
        saved, _ = self.checkpoints.settle()
        self._report(saved)
        return self.checkpoints.newest_step

    def is_new(self, notice: Notice | None) -> bool:
        """Whether a notice names a machine that no earlier notice names. Not collective."""
        return notice is not None and not self.leaving_machines.issuperset(notice.machines)

    def add_notice(self, notice: Notice | None, step: int) -> None:
        """Add a new notice to the state and to the journal. The earliest deadline counts. Not
        collective.
        """
        assert notice is not None, "only a new notice is added"
        self.leaving_machines |= frozenset(notice.machines)
        left_s = None
        if notice.deadline is not None:
            left_s = notice.deadline - time.time()
            self.deadline = min(self.deadline, time.monotonic() + left_s)
        self.context.tracker.write(
            Preempted(step=step, machines=list(notice.machines), seconds_left=left_s)
        )

    def _notice(self) -> Notice | None:
        """The notice of this rank, or else the notice in a request to save."""
        notice = self.context.rank_info.notice()
        # The file may be deleted, or a user may have made it.
        with suppress(OSError, ValueError, KeyError, TypeError):
            value = json.loads(self.files.save_request.read_text())
            if notice is None and value["machines"]:
                notice = Notice(tuple(value["machines"]), value["deadline"])
        return notice

    def _fulfil_request(self, step: int) -> None:
        """Delete the request to save once the checkpoint is complete. `Resizing` in
        launch/ray_trainer.py waits for the deletion before it ends the workers.
        """
        self.wait(step)
        if self.ranks.rank == 0:
            self.files.save_request.unlink(missing_ok=True)

    def _save(self, **progress: Any) -> None:
        began, context, network = time.monotonic(), self.context, self.context.backend.network
        if context.recipe.policy.replicas_every:
            self._compare_replicas(progress["step"])  # a checkpoint has the weights of one rank
        self.ranks.all_or_raise(lambda: self._check_finite(progress["step"]))
        trainer = checkpoint_metadata(context, **progress, state=self.state())
        with context.published():
            weights = weights_of(network) if self.ranks.rank == 0 else None
        with self.ranks.averaged_buffers(network) as buffers:
            self._report(
                self.checkpoints.save(
                    progress["step"],
                    context.backend,
                    context.rule,
                    trainer,
                    buffers=buffers,
                    weights=weights,
                )
            )
        self._last_save, self._last_save_at = progress, time.monotonic()
        self._stall_s = self._last_save_at - began  # includes the wait for the previous checkpoint

    def _compare_replicas(self, step: int) -> None:
        if ranks := drifted(self._replicated(), self.ranks):
            raise Rollback(
                step - 1,
                f"weights or rule buffers of workers {', '.join(map(str, ranks))} differ from those"
                " of others",
                skips=False,
            )

    def _check_finite(self, step: int) -> None:
        # Minimum and maximum are NaN if a number is NaN. The CPU waits for each device once.
        extremes: dict[torch.device, list[Tensor]] = {}
        for value in self._replicated():
            if value.is_floating_point() and value.numel():
                extremes.setdefault(value.device, []).append(
                    torch.stack(value.detach().aminmax()).double()
                )
        if not all(bool(torch.cat(parts).isfinite().all()) for parts in extremes.values()):
            raise Diverged(
                "training: weights and the rule's buffers must be finite in a checkpoint; they are"
                f" not after step {step}: {self.context.recipe.remedy}"
            )

    def _replicated(self) -> list[Tensor]:
        """The values that must be the same on every rank, bit for bit: weights, their average over
        steps if there is one, and the rule's buffers.
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
