"""One attempt at a run, from its newest checkpoint to its end: `Trainer.run` is the training
program.
"""

import math
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError
from pipeline.core.run_folder import RunFolder
from pipeline.measure.clock import synchronize
from pipeline.measure.constants import BETWEEN
from pipeline.measure.energy import joules_per_sample
from pipeline.measure.memory import memory_now_bytes
from pipeline.measure.meters import Totals
from pipeline.recipe.phases import stretch_at
from pipeline.recipe.recipe import write_json
from pipeline.spiking.encode import over_steps
from pipeline.track import events
from pipeline.track.journal import last_event
from pipeline.train.assemble import TrainContext
from pipeline.train.checkpointing import SavingHooks
from pipeline.train.elastic import seed_row
from pipeline.train.evaluation import (
    Evaluated,
    Evaluation,
    evaluate_tasks,
    mean_of,
    write_answers,
)
from pipeline.train.guards.anomaly import AnomalyGuard, can_undo
from pipeline.train.guards.replica_check import stragglers
from pipeline.train.job import stop_requester
from pipeline.train.loop import MicroBatch, train_batch
from pipeline.train.metadata import hardware_of, rule_metrics, start_event, summary_of
from pipeline.train.recovery import Rollback
from pipeline.train.tasks import TaskResults

MOST_DATA_WAIT = 0.2  # share of the time of steady batches; a longer wait for data is reported
STEADY_ENOUGH = 50  # steady batches before the wait is judged


class StopAsked(Exception):
    """Somebody asked the run to stop, and it is saved. Every rank raises it."""


class Trainer:
    """Trains the rest of a run with the parts of this process."""

    def __init__(self, context: TrainContext) -> None:
        self.context = context
        self.job, self.ranks, self.tracker = context.job, context.ranks, context.tracker
        self.recipe, self.meters, self.backend = context.recipe, context.meters, context.backend
        self.folder = Path(context.job.run)
        self.tasks, self.steps = context.loaders.tasks, context.stretches[-1].end
        self.loss_for = context.recipe.objective.build()
        restored = context.restored or {
            "step": 0,
            "learnt": {},
            "is_epoch_end_due": False,
            "totals": {},
            "guard": None,
            "rule_metrics": {},
        }
        self.restored, self.step = restored, restored["step"]
        self.learnt = TaskResults(**restored["learnt"])
        try:
            self.meters.totals = Totals(**restored["totals"])
        except TypeError as error:
            raise UserError(
                "checkpoint: its measurements must be of this version's kind; it was written at"
                f" commit {restored.get('commit')}: resume there ({error})"
            ) from None
        self.stretch = stretch_at(context.stretches, self.step)  # the steps of the current task
        self.guard = AnomalyGuard(
            self.backend,
            context.rule,
            self.ranks,
            spike=self.recipe.policy.loss_spike,
            max_skips=self.recipe.policy.max_skips,
            can_undo=can_undo(self.recipe, context.rule),
            on_skip=lambda step, reason: self._report_skip(step, reason, self.recipe.remedy),
            state=restored["guard"],
        )
        self.saving = SavingHooks(context, step=self.step, state=self._state)
        # seconds of work between batches of earlier attempts; None once a batch has ended
        self.worked_before_s: float | None = self._worked_s()
        self.has_reported_data_wait = False
        self.evaluated: list[Evaluated] = []  # the last evaluation, of each task so far

    # ------------------------------------------------------------------------- the training program

    def run(self) -> dict[str, Any] | None:
        """Train to the end. Returns the summary (on rank 0), or None if a stop was requested.

        Raises:
            Rollback: the run has to start again at its newest checkpoint; on every rank.
        """
        with self.saving:
            try:
                self._start()
                while self.step < self.steps:
                    self._train()
                return self._finish()
            except StopAsked:
                self.saving.wait(self.step)
                self.tracker.write(
                    events.Stopped(
                        step=self.step,
                        reason=stop_requester(self.folder),
                        resume_command=self.job.resume_command,
                    )
                )
                return None

    def _start(self) -> None:
        limit = self.context.decisions.micro_batch
        if limit is not None and self.ranks.rank == 0:
            # Another worker may have halved its micro-batch, and died before it could journal it.
            known = last_event(RunFolder(self.folder).journal, events.Start, events.Smaller)
            if known is not None and limit < known.micro_batch:
                self.tracker.write(
                    events.Smaller(
                        step=self.step,
                        micro_batch=limit,
                        reason="memory ran out on another worker",
                    )
                )
        self.tracker.write(start_event(self.context, step=self.step))
        if self.step == 0:
            self._compare_gradients(epoch=None)
        self.meters.forget_peaks()
        if self.restored["is_epoch_end_due"]:
            self.stretch = stretch_at(self.context.stretches, self.step - 1)
            self._end_epoch(self.stretch.epoch(self.step - 1))

    def _train(self) -> None:
        self.stretch = stretch = stretch_at(self.context.stretches, self.step)
        with closing(self.context.loaders.train(stretch.index)) as train_set:
            self.tasks[stretch.index].choose_head(self.backend.network)
            if self.step == stretch.first:  # its checkpoint was saved before the task began
                self._begin_task()
            while self.step < stretch.end:
                epoch = stretch.epoch(self.step)
                end = stretch.epoch_end(epoch)
                start = (self.step - stretch.epoch_start(epoch)) * self.recipe.batch_size
                with train_set.epoch(epoch, start=start) as loader:
                    source = iter(loader)
                    while self.step < end:
                        self._train_batch(source)
                        self.step += 1
                        with self.meters.between("coordination"):
                            self._between_batches(epoch, last=self.step == end)
                self._end_epoch(epoch)

    def _begin_task(self) -> None:
        task, stretch = self.tasks[self.stretch.index], self.stretch
        if stretch.index:
            self.backend.reset_optimizer()
        self.context.rule.start_task(self.backend.network, stretch.index)
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

    def _train_batch(self, source: Iterator[Any]) -> None:
        skipped = (*self.recipe.policy.skip, *self.context.decisions.skipped)
        if any(first <= self.step < end for first, end in skipped):
            for _ in range(self.context.split.accumulation):
                next(source)
            self._report_skip(self.step, "left out by the recipe or a rollback")
            return
        train_batch(
            self.context.rule,
            self.backend,
            self.context.schedule,
            self.step,
            self._micro_batches(source),
            self.loss_for,
            self.meters,
            self.guard,
        )
        if self.worked_before_s is not None:
            # Start-up is imports, compilation and this batch, without work between batches such as
            # an evaluation that was due.
            synchronize(self.ranks.device)
            seconds = time.time() - self.context.began - (self._worked_s() - self.worked_before_s)
            self.tracker.write(events.FirstBatch(step=self.step + 1, startup_s=max(0.0, seconds)))
            self.worked_before_s = None

    def _micro_batches(self, source: Iterator[Any]) -> Iterator[MicroBatch]:
        """This rank's micro-batches of the next global batch: on the device, mixed, laid out over
        time, and with the teacher's logits.
        """
        context, recipe, split = self.context, self.recipe, self.context.split
        device, stretch = self.ranks.device, self.stretch
        for index in range(split.accumulation):
            with self.meters.part("data_wait"):
                batch = next(source)
            with self.meters.part("transfer"):
                x_B = batch.x.to(device, non_blocking=True)
                target_B = batch.target.to(device, non_blocking=True)
                first = (index * split.workers + self.ranks.rank) * split.micro_batch
                if len(context.rank_info.possible_sizes) > 1:
                    seed_row(recipe.seed, step=self.step, row=first)
                rows = range(first, first + split.micro_batch)
                if context.mixing is not None:
                    x_B, target_B = context.mixing(
                        x_B,
                        target_B,
                        classes=self.tasks[stretch.index].data.classes,
                        seed=recipe.seed,
                        step=self.step,
                        rows=rows,
                    )
                x_TB = over_steps(x_B, recipe.time_steps)
            teacher_BK = None
            if context.teaching is not None:
                with self.meters.part("teacher"):
                    teacher_BK = context.teaching(x_B, batch.index, stretch.epoch(self.step))
            yield MicroBatch(
                x_TB, target_B, rows, split.micro_batch / recipe.batch_size, teacher_BK
            )

    def _between_batches(self, epoch: int, *, last: bool) -> None:
        self.context.watchdog.beat()
        if self.step % self.recipe.log_every == 0 or last:
            metrics = self.meters.take(self.ranks.sum)
            self._report_slowness()
            of_rule = {f"rule_{name}": value for name, value in self._rule_metrics().items()}
            metrics |= {"lr": self.backend.optimizer.param_groups[0]["lr"], **of_rule}
            with self.meters.between("tracking"):
                self.tracker.write(
                    events.Step(
                        step=self.step,
                        epoch=epoch,
                        metrics=metrics,
                        memory_bytes=memory_now_bytes(self.ranks.device),
                    )
                )
        if self.saving.between_batches(self.step, last=last):
            raise StopAsked

    def _end_epoch(self, epoch: int) -> None:
        """Evaluate, compare gradients and save, each if it is due.

        The checkpoint has the score of the evaluation. If much training is unsaved, a checkpoint
        without a score is written before the evaluation.
        """
        stretch, score, every = self.stretch, None, self.recipe.evaluation.every
        is_learnt = self.step == stretch.end
        if is_learnt or (every and (epoch - stretch.first_epoch + 1) % every == 0):
            of_rule = self._rule_metrics()
            self.saving.before_evaluation(self.step)
            with self.meters.between("evaluation"):
                results = self._evaluate()
            # Before the last task, the mean is over fewer tasks and cannot rank checkpoints.
            result = mean_of(results)
            score = result.top1 if stretch.index + 1 == len(self.tasks) else None
            metrics = result.metrics
            if self.recipe.phases:
                metrics |= self.learnt.metrics([result.top1 for result in results], self.tasks)
            self.tracker.write(
                events.Evaluation(
                    step=self.step, epoch=epoch, samples=result.samples, metrics=metrics
                )
            )
            if is_learnt:
                self.learnt.rows.append([result.top1 for result in results])
                self.learnt.rule_metrics.append(of_rule)
        if (epoch + 1) % max(1, self.recipe.evaluation.fidelity_every) == 0:
            self._compare_gradients(epoch=epoch)
        self.saving.save(self.step, score=score)

    def _evaluate(self) -> list[Evaluation]:
        """The results on each task so far, the current one last.

        Raises:
            StopAsked: the run is saved.
            Rollback: a loss is not finite. Finite weights can still give such a loss.
        """
        while (
            evaluated := evaluate_tasks(
                self.context,
                step=self.step,
                tasks=self.stretch.index + 1,
                counts_operations=self.step == self.steps,
                is_interrupted=self.saving.is_interrupted,
            )
        ) is None:
            if self.saving.in_evaluation(self.step):
                raise StopAsked
        self.evaluated = evaluated
        results = [each.result for each in evaluated]
        if bad := [result.loss for result in results if not math.isfinite(result.loss)]:
            reason = f"the loss of the evaluation after it is {bad[0]}"
            self.saving.newest_step()  # nothing is being written after it
            self.context.checkpoints.discard(self.step, reason)
            raise Rollback(self.step - 1, reason)
        return results

    def _finish(self) -> dict[str, Any]:
        if not self.evaluated:  # an earlier attempt has trained everything
            self._evaluate()
        self.saving.wait(self.step)
        last, inference = self.evaluated[-1], None
        answers = self.ranks.all_gather_object([each.answers for each in self.evaluated])
        measured_j = joules_per_sample(self.ranks.all_gather_object(last.readings))
        if last.inference is not None:
            inference = {
                **last.inference.to_dict(measured_j),
                # describes the samples whose operations were counted
                "counted_on": "from all over the first worker's share of the evaluation set",
            }
        summary = summary_of(
            self.context,
            step=self.step,
            result=mean_of([each.result for each in self.evaluated]),
            totals=self.meters.over_ranks(self.ranks.max, self.ranks.mean),
            learnt=self.learnt,
            rule_metrics=self._rule_metrics(),
            inference=inference,
        )
        hardware = hardware_of(self.ranks)
        if self.ranks.rank == 0:
            files = RunFolder(self.folder)
            write_json(files.activity, [asdict(layer) for layer in last.activity])
            write_answers(files.answers, answers, tasks=bool(self.recipe.phases))
            write_json(files.summary, {**summary, "hardware": hardware})
        self.tracker.write(events.Finish(step=self.step, summary=summary))
        return summary

    # ---------------------------------------------------------------------------- state and metrics

    def _state(self) -> dict[str, Any]:
        """The state of this object in a checkpoint; `__init__` restores it. Collective."""
        return {
            "totals": asdict(self.meters.over_ranks(self.ranks.max, self.ranks.mean)),
            "rule_metrics": self._rule_metrics(),
            "learnt": asdict(self.learnt),
            "guard": self.guard.state_dict(),
        }

    def _rule_metrics(self) -> dict[str, float]:
        return rule_metrics(self.context.rule, self.ranks, self.restored["rule_metrics"])

    def _worked_s(self) -> float:
        return sum(self.meters.totals.seconds[name] for name in BETWEEN)

    def epoch_of(self, step: int) -> int:
        return stretch_at(self.context.stretches, step).epoch(step)

    # -------------------------------------------------------------------------------------- reports

    def _report_skip(self, step: int, reason: str, advice: str = "") -> None:
        self.tracker.write(
            events.Skipped(
                step=step,
                epoch=self.epoch_of(step),
                reason=reason,
                samples=self.recipe.batch_size,
                advice=advice,
            )
        )

    def _report_slowness(self) -> None:
        """Report slow ranks, and once per attempt that this rank waits much for data."""
        if slow := stragglers(self.meters.busy_s, self.ranks):
            hosts = self.ranks.all_gather_object(socket.gethostname())
            workers = {
                str(rank): {"times": times, "host": hosts[rank]} for rank, times in slow.items()
            }
            self.tracker.write(events.Straggler(step=self.step, workers=workers))
        share = self.meters.totals.share_of_steady_time("data_wait")
        is_judged = self.meters.totals.steady_batches >= STEADY_ENOUGH
        if is_judged and share > MOST_DATA_WAIT and not self.has_reported_data_wait:
            self.has_reported_data_wait = True
            self.tracker.write(
                events.DataWait(step=self.step, share=share, loader_threads=self.job.loader_threads)
            )

    def _compare_gradients(self, *, epoch: int | None) -> None:
        """Compare the rule's gradient with BPTT's, at the trained weights, not at their average.
        `epoch`: the epoch that has ended; None: the start of the run.
        """
        if self.context.fidelity is None:
            return
        self.meters.note_peaks()
        with self.meters.between("fidelity"):
            fidelity = self.context.fidelity(
                self.backend.network.state_dict(), self.context.rule.state_dict(), step=self.step
            )
        self.meters.forget_peaks()  # memory of the comparison, such as BPTT's graph
        self.tracker.write(
            events.Fidelity(
                step=self.step,
                epoch=epoch,
                temporal_share=fidelity.temporal_share,
                cosines=fidelity.cosines,
            )
        )
