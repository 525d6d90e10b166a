"""One attempt at a run, from where its newest checkpoint stands to its end.

Between two global batches a worker looks up from the loop: `Trainer._between_batches` logs, saves,
and stops when asked; in an evaluation, which may be long, it looks up for whoever asks. All ranks
do the same after the same step: see saving.py."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.core.errors import Diverged, UserError
from pipeline.core.run_folder import RunFolder
from pipeline.measure.clock import synchronize
from pipeline.measure.constants import BETWEEN
from pipeline.measure.energy import joules_per_sample
from pipeline.measure.memory import memory_now_bytes
from pipeline.measure.meters import Totals
from pipeline.recipe.phases import stretch_at
from pipeline.recipe.recipe import write_json
from pipeline.track import events
from pipeline.train.checkpointing import Saving
from pipeline.train.context import TrainContext
from pipeline.train.evaluate_tasks import assess
from pipeline.train.evaluation import COUNTED_ON, Evaluated, Evaluation
from pipeline.train.guards.anomaly import Guard, Rollback, is_in, takes_back
from pipeline.train.guards.oom import untold
from pipeline.train.guards.replica_check import stragglers
from pipeline.train.job import asked_by
from pipeline.train.loop import MicroBatch, train
from pipeline.train.metadata import hardware_of, held_without_zero, start_event, told_at_the_end
from pipeline.train.microbatch import micro_batches
from pipeline.train.predictions import write_answers
from pipeline.train.rule_metrics import Figures
from pipeline.train.tasks import Learnt, mean_of

MOST_DATA_WAIT = 0.2
"""of the time of steady batches: a loader that takes more is told of"""
STEADY_ENOUGH = 50
"""batches, before that is judged"""


class Trainer:
    """Trains the rest of a run with the parts of this process."""

    def __init__(self, parts: TrainContext) -> None:
        self.parts = parts
        self.job, self.ranks, self.tracker, self.recipe = (
            parts.job,
            parts.ranks,
            parts.tracker,
            parts.recipe,
        )
        self.meters, self.backend = parts.meters, parts.backend
        self.folder = Path(parts.job.run)
        self.tasks, self.steps = parts.loaders.tasks, parts.stretches[-1].end
        self.step, self.learnt = 0, Learnt()
        if parts.trainer is not None:
            self.step = parts.trainer["step"]
            self.meters.totals = _totals(parts.trainer)
            self.learnt = Learnt(**parts.trainer["learnt"])
        self.owes_epoch_end = parts.trainer is not None and parts.trainer.get(
            "owes_epoch_end", False
        )
        """an epoch has ended, and whoever saved had no time for its evaluation"""
        self.stretch = stretch_at(parts.stretches, self.step)
        self.is_starting, self.worked_before_s = True, self._worked_s()
        """until its first batch has ended; and what earlier attempts did between batches"""
        self.result: Evaluation | None = None
        self.evaluated: list[Evaluated] = []
        """in the last evaluation, on each task so far"""
        self.stop_asked = False
        self.watchdog = parts.watchdog
        self.told_data_wait = False
        self.skipped = (*self.recipe.policy.skip, *parts.skipped.batches)
        self.guard = Guard(
            self.backend,
            parts.rule,
            self.ranks,
            spike=self.recipe.policy.loss_spike,
            skips=self.recipe.policy.max_skips,
            takes_back=takes_back(self.recipe, parts.rule),
            on_skip=self._tell_bad,
            state=None if parts.trainer is None else parts.trainer.get("guard"),
        )
        self.figures = Figures(parts)
        self.saving = Saving(
            parts, step=self.step, learnt=self.learnt, guard=self.guard, figures=self.figures
        )

    def run(self) -> dict[str, Any] | None:
        """The summary (on rank 0), or None when somebody asked to stop.

        Raises:
            Rollback: on every rank, once it is written down: the run has to begin again at its
            newest checkpoint.
        """
        try:
            return self._run()
        except Rollback as back:
            self._go_back(back)
            raise
        except BaseException as error:
            self.saving.close(error)
            raise

    def _run(self) -> dict[str, Any] | None:
        self._tell_smaller()
        self.tracker.write(start_event(self.parts, step=self.step))
        self._tell_nearness(epoch=None)
        self.meters.forget_peaks()
        if self.owes_epoch_end:
            self.stretch = stretch_at(self.parts.stretches, self.step - 1)
            self._end_of_epoch(self.stretch.epoch(self.step - 1))
        while self.step < self.steps and not self.stop_asked:
            self.stretch = stretch_at(self.parts.stretches, self.step)
            with closing(self.parts.loaders.train(self.stretch.index)) as self.train_set:
                self._train()
        if (
            self.result is None and not self.stop_asked
        ):  # this attempt found nothing left but to tell of it
            results = self._evaluate()
            self.result = mean_of(results) if results else None
        return self._stopped() if self.stop_asked else self._finish()

    def _tell_smaller(self) -> None:
        """By rank 0, before the start that says what is tried next: another one has met it and died
        of it.
        """
        if self.ranks.rank == 0 and (samples := untold(self.folder)) is not None:
            reason = "memory ran out on another worker"
            self.tracker.write(events.Smaller(step=self.step, micro_batch=samples, reason=reason))

    def _train(self) -> None:
        """The rest of the task at hand."""
        stretch = self.stretch
        self.tasks[stretch.index].choose_head(self.backend.network)
        if (
            self.step == stretch.first
        ):  # a checkpoint at a boundary was saved before the next task began
            self._begin_task()
        while self.step < stretch.end and not self.stop_asked:
            epoch = stretch.epoch(self.step)
            with closing(self.batches(epoch)) as batches:
                loss_for = self.recipe.objective.build()
                train(
                    self.parts.rule,
                    self.backend,
                    self.parts.schedule,
                    batches,
                    loss_for,
                    self.meters,
                    self.guard,
                )
            if self.step == stretch.epoch_end(epoch) and not self.stop_asked:
                self._end_of_epoch(epoch)

    def _begin_task(self) -> None:
        task, stretch = self.tasks[self.stretch.index], self.stretch
        if stretch.index:
            self.backend.forget()
        self.parts.rule.start_task(self.backend.network, stretch.index)
        self.guard.begin_task()
        if self.recipe.phases:
            self.tracker.write(
                events.Phase(
                    step=self.step,
                    phase=stretch.index,
                    of=len(self.tasks),
                    name=task.name,
                    head=task.head,
                    steps=stretch.steps,
                    epochs=task.epochs,
                )
            )

    # -------------------------------------------------------------------------------------- batches

    def batches(self, epoch: int) -> Generator[tuple[int, Iterator[MicroBatch]]]:
        """The rest of an epoch; what happens between two batches happens here, after the loop asked
        for the next.
        """
        end = self.stretch.epoch_end(epoch)
        start = (self.step - self.stretch.epoch_start(epoch)) * self.recipe.batch_size
        with self.train_set.epoch(epoch, start=start) as loader:
            source = iter(loader)
            while self.step < end:
                if is_in(self.step, self.skipped):
                    self._pass_over(source)
                else:
                    yield self.step, self._micro_batches(source)
                    if self.is_starting:
                        self._tell_startup()
                self.step += 1
                with self.meters.between("coordination"):
                    self._between_batches(epoch, last=self.step == end)
                if self.stop_asked:
                    return

    def _tell_startup(self) -> None:
        """How long this attempt took until its first batch had ended: imports, compilation and that
        batch.

        What was done between batches meanwhile, such as an evaluation that was owed, is left out.
        """
        self.is_starting = False
        synchronize(self.parts.device)
        work = self._worked_s() - self.worked_before_s
        seconds = max(0.0, time.time() - self.parts.began - work)
        self.tracker.write(events.FirstBatch(step=self.step + 1, startup_s=seconds))

    def _worked_s(self) -> float:
        return sum(self.meters.totals.seconds[name] for name in BETWEEN)

    def _micro_batches(self, source: Iterator[Any]) -> Iterator[MicroBatch]:
        return micro_batches(self.parts, source, step=self.step, stretch=self.stretch)

    def _pass_over(self, source: Iterator[Any]) -> None:
        """A batch that is not learnt from: the recipe says so, or going back did."""
        for _ in range(self.parts.split.accumulation):
            next(source)
        self._tell_skipped(self.step, "as it was told to")

    def _tell_bad(self, step: int, reason: str) -> None:
        self._tell_skipped(step, reason, advice=self.recipe.remedy)

    def _tell_skipped(self, step: int, reason: str, *, advice: str = "") -> None:
        self.tracker.write(
            events.Skipped(
                step=step,
                epoch=self._epoch_of(step),
                reason=reason,
                samples=self.recipe.batch_size,
                advice=advice,
            )
        )

    def _between_batches(self, epoch: int, *, last: bool) -> None:
        """Log, save where it is time, and hear whether somebody asks to stop; for an epoch's end
        see `_end_of_epoch`.
        """
        recipe = self.recipe
        self.watchdog.beat()
        if self.step % recipe.log_every == 0 or last:
            metrics = self.meters.take(self.ranks.sum)
            self._tell_stragglers()
            self._tell_data_wait()
            metrics["lr"] = self.backend.optimizer.param_groups[0]["lr"]
            metrics |= {f"rule_{name}": value for name, value in self.figures.now().items()}
            with self.meters.between("tracking"):
                self.tracker.write(
                    events.Step(
                        step=self.step,
                        epoch=epoch,
                        metrics=metrics,
                        memory_bytes=memory_now_bytes(self.parts.device),
                    )
                )
        self.stop_asked = self.saving.between_batches(self.step, last=last)

    def _tell_stragglers(self) -> None:
        slow = stragglers(self.meters.busy_s, self.ranks)
        if slow:
            hosts = self.ranks.all_gather_object(socket.gethostname())
            workers = {
                str(rank): {"times": times, "host": hosts[rank]} for rank, times in slow.items()
            }
            self.tracker.write(events.Straggler(step=self.step, workers=workers))

    def _tell_data_wait(self) -> None:
        """Once an attempt, where this rank waits for its data for much of the time."""
        totals = self.meters.totals
        share = totals.share_of_steady_time("data_wait")
        if (
            not self.told_data_wait
            and totals.steady_batches >= STEADY_ENOUGH
            and share > MOST_DATA_WAIT
        ):
            self.told_data_wait = True
            self.tracker.write(
                events.DataWait(step=self.step, share=share, loader_threads=self.job.loader_threads)
            )

    # --------------------------------------------------------------------------------------- epochs

    def _end_of_epoch(self, epoch: int) -> None:
        """Evaluate, compare gradients and save, each where it is time; in vain where somebody asks
        to stop meanwhile.

        It is saved with the score of its evaluation, and before that without one where much would
        be lost with the workers."""
        stretch, score, every = self.stretch, None, self.recipe.evaluation.every
        is_learnt = self.step == stretch.end
        if is_learnt or (every and (epoch - stretch.first_epoch + 1) % every == 0):
            figures = self.figures.now()
            self.saving.before_evaluation(self.step)
            with self.meters.between("evaluation"):
                results = self._evaluate()
            if self.stop_asked:
                return
            self.result = mean_of(results)
            # With tasks to come the mean is one of other tasks: no score to find the best
            # checkpoint by.
            score = self.result.top1 if stretch.index + 1 == len(self.tasks) else None
            self._tell_results(epoch, results)
            if is_learnt:
                self.learnt.add([result.top1 for result in results], figures)
        self._tell_nearness(epoch=epoch)
        self.saving.save(self.step, score=score)

    def _tell_nearness(self, *, epoch: int | None) -> None:
        """On the weights that train, not on an average of them; `epoch`: that has ended, None at
        the start.
        """
        due = (
            self.step == 0
            if epoch is None
            else (epoch + 1) % max(1, self.recipe.evaluation.fidelity_every) == 0
        )
        if self.parts.nearness is None or not due:
            return
        self.meters.note_peaks()
        with self.meters.between("fidelity"):
            found = self.parts.nearness(
                self.backend.network.state_dict(), self.parts.rule.state_dict(), step=self.step
            )
        # what the comparison held, BPTT's graph among it, is not what training needs
        self.meters.forget_peaks()
        self.tracker.write(
            events.Fidelity(
                step=self.step,
                epoch=epoch,
                temporal_share=found.temporal_share,
                cosines=found.cosines,
            )
        )

    def _tell_results(self, epoch: int, results: list[Evaluation]) -> None:
        assert self.result is not None
        metrics = self.result.metrics
        if self.recipe.phases:
            metrics |= self.learnt.metrics([result.top1 for result in results], self.tasks)
        self.tracker.write(
            events.Evaluation(
                step=self.step, epoch=epoch, samples=self.result.samples, metrics=metrics
            )
        )

    def _evaluate(self) -> list[Evaluation]:
        """On each task so far, the one at hand last; nothing where somebody asked to stop
        meanwhile.
        """
        about = {
            "step": self.step,
            "tasks": self.stretch.index + 1,
            "counts_operations": self.step == self.steps,
        }
        self.evaluated = []
        while (found := assess(self.parts, **about, is_asked=self.saving.is_asked)) is None:
            self.stop_asked = self.saving.in_evaluation(self.step)
            if self.stop_asked:
                return []
        self.evaluated = found
        results = [each.result for each in found]
        self._check_evaluation(results)
        return results

    def _check_evaluation(self, results: list[Evaluation]) -> None:
        """Weights that are finite can answer with numbers that are not: training has diverged, and
        does not go on from there.
        """
        if bad := [result.loss for result in results if not math.isfinite(result.loss)]:
            reason = f"the loss of the evaluation after it is {bad[0]}"
            self.saving.discard(self.step, reason)
            raise Rollback(self.step - 1, reason)

    # ----------------------------------------------------------------------------------------- ends

    def _go_back(self, back: Rollback) -> None:
        """Write down what is skipped from now on; the next attempt reads it."""
        saved, done = self.saving.newest_step(), self.parts.skipped.rollbacks
        if done == self.recipe.policy.max_rollbacks:
            where = f"batch {back.step} (epoch {self._epoch_of(back.step) + 1})"
            said = f"training: {where}: {back.reason}; it has gone back max_rollbacks={done} times"
            if back.skips:
                raise Diverged(f"{said}; {self.recipe.remedy}") from back
            raise UserError(
                f"{said}; a memory, a device or a network is at fault: look with spiketrain doctor"
            ) from back
        decided = self.parts.skipped.after(back, saved=saved)
        self.ranks.broadcast_object(lambda: decided.write(self.folder))
        self.tracker.write(
            events.Rollback(
                step=back.step,
                epoch=self._epoch_of(back.step),
                to=saved,
                reason=back.reason,
                advice=self.recipe.remedy if back.skips else "",
            )
        )

    def _epoch_of(self, step: int) -> int:
        return stretch_at(self.parts.stretches, step).epoch(step)

    def _stopped(self) -> None:
        self.saving.wait(self.step)
        self.tracker.write(
            events.Stopped(
                step=self.step,
                reason=asked_by(self.folder),
                resume_command=self.job.resume_command,
            )
        )

    def _finish(self) -> dict[str, Any]:
        self.saving.wait(self.step)
        assert self.result is not None
        totals, figures = (
            self.meters.over_ranks(self.ranks.max, self.ranks.mean),
            self.figures.now(),
        )
        kept = held_without_zero(self.parts)
        answers = self.ranks.gather([each.answers for each in self.evaluated])
        measured_j = joules_per_sample(self.ranks.gather(self.evaluated[-1].readings))
        hardware = hardware_of(self.ranks)
        summary: dict[str, Any] = {}
        if self.ranks.rank == 0:
            inference = self.evaluated[-1].inference
            summary = {
                **told_at_the_end(
                    self.parts,
                    step=self.step,
                    result=self.result,
                    totals=totals,
                    kept=kept,
                    learnt=self.learnt,
                    figures=figures,
                ),
                "inference": (
                    None
                    if inference is None
                    else {**inference.to_dict(measured_j), "counted_on": COUNTED_ON}
                ),
            }
            files = RunFolder(self.folder)
            write_json(files.activity, [asdict(layer) for layer in self.evaluated[-1].activity])
            write_answers(files.answers, answers, tasks=bool(self.recipe.phases))
            write_json(files.summary, {**summary, "hardware": hardware})
        self.tracker.write(events.Finish(step=self.step, summary=summary))
        return summary


def _totals(trainer: Mapping[str, Any]) -> Totals:
    try:
        return Totals(**trainer["totals"])
    except TypeError as error:
        raise UserError(
            "checkpoint: what was measured must be of this version's kind; it was written at"
            f" commit {trainer.get('commit')}: go on there ({error})"
        ) from None
