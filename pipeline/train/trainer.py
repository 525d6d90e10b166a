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
from pipeline.measure.constants import SECTIONS
from pipeline.measure.energy import joules_per_sample
from pipeline.measure.memory import memory_now_bytes
from pipeline.measure.meters import Totals
from pipeline.recipe.phases import stretch_at
from pipeline.recipe.recipe import write_json
from pipeline.spiking.encode import to_time_first
from pipeline.track import events
from pipeline.track.journal import last_event
from pipeline.train.assemble import TrainContext
from pipeline.train.backend.collectives import stragglers
from pipeline.train.checkpointing import SavingHooks
from pipeline.train.elastic import seed_micro_batch
from pipeline.train.evaluation import (
    Evaluation,
    EvaluationOutput,
    evaluate_tasks,
    mean_over_tasks,
    write_predictions,
)
from pipeline.train.guards.anomaly import AnomalyGuard, can_undo
from pipeline.train.job import stop_reason
from pipeline.train.loop import MicroBatch, train_batch
from pipeline.train.metadata import hardware_of, rule_metrics, start_event, summary_of
from pipeline.train.recovery import Rollback
from pipeline.train.tasks import TaskResults
from pipeline.train.transfer import Arriving, arriving

# A wait for data is reported if its share of the time of steady batches is above
# MAX_DATA_WAIT_SHARE. The share is known after MIN_STEADY_BATCHES steady batches.
MAX_DATA_WAIT_SHARE = 0.2
MIN_STEADY_BATCHES = 50


class StopRequested(Exception):
    """The run must stop. Every rank raises this exception, after the run is saved."""


class Trainer:
    def __init__(self, context: TrainContext) -> None:
        self.context = context
        self.job, self.ranks, self.tracker = context.job, context.ranks, context.tracker
        self.recipe, self.meters, self.backend = context.recipe, context.meters, context.backend
        self.folder = Path(context.job.run)
        self.tasks, self.total_steps = context.loaders.tasks, context.stretches[-1].end
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
        self.task_results = TaskResults(**restored["learnt"])
        try:
            self.meters.totals = Totals(**restored["totals"])
        except TypeError as error:
            raise UserError(
                "checkpoint: it must have the measurements of this version of spiketrain; it was"
                f" written at commit {restored.get('commit')}: resume the run there ({error})"
            ) from None
        self.stretch = stretch_at(context.stretches, self.step)  # the steps of the current task
        self.guard = AnomalyGuard(
            self.backend,
            context.rule,
            self.ranks,
            spike=self.recipe.policy.loss_spike,
            max_skips=self.recipe.policy.max_skips,
            can_undo=can_undo(self.recipe, context.rule),
            on_skip=self._drop,
            state=restored["guard"],
        )
        self.saving = SavingHooks(context, step=self.step, state=self._state)
        # seconds of work between batches, at the start of the attempt; None after its first batch
        self.restored_between_s: float | None = self._between_s()
        self.has_reported_data_wait = False
        self.evaluated: list[
            EvaluationOutput
        ] = []  # the last evaluation: an entry for each task so far

    # ------------------------------------------------------------------------- the training program

    def run(self) -> dict[str, Any] | None:
        """Train to the end. Returns the summary on rank 0 and {} on other ranks; None if a stop was
        requested.

        Raises:
            Rollback: the run has to start again at its newest checkpoint. Every rank raises it.
            Diverged: the weights are not finite.
        """
        with self.saving:
            try:
                self._start()
                while self.step < self.total_steps:
                    self._train()
                return self._finish()
            except StopRequested:
                self.saving.wait(self.step)
                self.tracker.write(
                    events.Stopped(
                        step=self.step,
                        reason=stop_reason(self.folder),
                        resume_command=self.job.resume_command,
                    )
                )
                return None

    def _start(self) -> None:
        limit = self.context.decisions.micro_batch
        if limit is not None and self.ranks.rank == 0:
            # A worker that runs out of memory writes the smaller micro-batch to the decisions, but
            # only rank 0 can write to the journal.
            last = last_event(RunFolder(self.folder).journal, events.Start, events.Smaller)
            if last is not None and limit < last.micro_batch:
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
            if self.step == stretch.first:  # also after a resume at the end of the previous task
                self._begin_task()
            while self.step < stretch.end:
                epoch = stretch.epoch(self.step)
                end = stretch.epoch_end(epoch)
                start = (self.step - stretch.epoch_start(epoch)) * self.recipe.batch_size
                with train_set.epoch(epoch, start=start) as loader:
                    source = arriving(loader, self.ranks.device)
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

    def _train_batch(self, source: Iterator[Arriving]) -> None:
        skipped = (*self.recipe.policy.skip, *self.context.decisions.skipped)
        if any(first <= self.step < end for first, end in skipped):
            for _ in range(self.context.split.accumulation):
                next(source)
            self._report_skip(self.step, "excluded by the recipe or by a rollback")
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
        if self.restored_between_s is not None:
            # Start-up is imports, compilation and this batch, without work between batches such as
            # an evaluation that was due.
            synchronize(self.ranks.device)
            between_s = self._between_s() - self.restored_between_s
            startup_s = max(0.0, time.time() - self.context.began - between_s)
            self.tracker.write(events.FirstBatch(step=self.step + 1, startup_s=startup_s))
            self.restored_between_s = None

    def _micro_batches(self, source: Iterator[Arriving]) -> Iterator[MicroBatch]:
        """This rank's micro-batches of the next global batch, on the device. Mixing, encoding over
        time and the teacher have been applied.
        """
        context, recipe, split = self.context, self.recipe, self.context.split
        for index in range(split.accumulation):
            with self.meters.part("data_wait"):
                arriving_batch = next(source)
            with self.meters.part("transfer"):
                batch = arriving_batch.arrive()
                x_B, target_B = batch.x, batch.target
                first = (index * split.workers + self.ranks.rank) * split.micro_batch
                seed_micro_batch(recipe.seed, step=self.step, first_row=first)
                rows = range(first, first + split.micro_batch)
                if context.mixing is not None:
                    x_B, target_B = context.mixing(
                        x_B,
                        target_B,
                        classes=self.tasks[self.stretch.index].data.classes,
                        seed=recipe.seed,
                        step=self.step,
                        rows=rows,
                    )
                x_TB = to_time_first(x_B, recipe.time_steps)
            teacher_BK = None
            if context.teaching is not None:
                with self.meters.part("teacher"):
                    teacher_BK = context.teaching(x_B, batch.index, self.stretch.epoch(self.step))
            yield MicroBatch(
                x_TB=x_TB,
                target_B=target_B,
                rows=rows,
                share=split.micro_batch / recipe.batch_size,
                teacher_BK=teacher_BK,
            )

    def _between_batches(self, epoch: int, *, last: bool) -> None:
        self.context.watchdog.beat()
        if self.step % self.recipe.log_every == 0 or last:
            self.guard.settle()
            metrics = self.meters.take(self.ranks.sum)
            self._report_slowness()
            metrics["lr"] = self.backend.optimizer.param_groups[0]["lr"]
            metrics |= {f"rule_{name}": value for name, value in self._rule_metrics().items()}
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
            raise StopRequested

    def _end_epoch(self, epoch: int) -> None:
        """Evaluate if that is due, compare gradients if that is due, and save.

        The checkpoint has a score if all tasks were evaluated. `before_evaluation` may write an
        earlier checkpoint without a score.
        """
        stretch, score, evaluation = self.stretch, None, self.recipe.evaluation
        is_task_end = self.step == stretch.end
        epochs = epoch - stretch.first_epoch + 1  # of this task
        if is_task_end or (evaluation.every and epochs % evaluation.every == 0):
            rule_metrics_before = self._rule_metrics()
            self.saving.before_evaluation(self.step)
            self.tracker.write(events.Evaluating(step=self.step))
            with self.meters.between("evaluation"):
                results = self._evaluate()
            mean = mean_over_tasks(results)
            metrics, top1_row = mean.metrics, [result.top1 for result in results]
            # Only means over all tasks can rank checkpoints.
            score = mean.top1 if stretch.index + 1 == len(self.tasks) else None
            if self.recipe.phases:
                metrics |= self.task_results.metrics(top1_row, self.tasks)
            self.tracker.write(
                events.Evaluation(
                    step=self.step, epoch=epoch, samples=mean.samples, metrics=metrics
                )
            )
            if is_task_end:
                self.task_results.rows.append(top1_row)
                self.task_results.rule_metrics.append(rule_metrics_before)
        if evaluation.fidelity_every and (epoch + 1) % evaluation.fidelity_every == 0:
            self._compare_gradients(epoch=epoch)
        self.saving.save(self.step, score=score)

    def _evaluate(self) -> list[Evaluation]:
        """The results on each task so far, the current one last.

        Raises:
            StopRequested: a stop was requested during the evaluation. The run is saved.
            Rollback: the loss on a task is not finite, which is possible with finite weights.
        """
        while (
            evaluated := evaluate_tasks(
                self.context,
                step=self.step,
                tasks_so_far=self.stretch.index + 1,
                counts_operations=self.step == self.total_steps,
                is_interrupted=self.saving.is_interrupted,
            )
        ) is None:
            if self.saving.save_in_evaluation(self.step):
                raise StopRequested
        self.evaluated = evaluated
        results = [each.result for each in evaluated]
        if bad_losses := [each.loss for each in results if not math.isfinite(each.loss)]:
            reason = f"the loss of the next evaluation is {bad_losses[0]}"
            self.saving.newest_step()  # waits until no checkpoint is being written
            self.context.checkpoints.discard(self.step, reason)
            raise Rollback(self.step - 1, reason)
        return results

    def _finish(self) -> dict[str, Any]:
        if not self.evaluated:  # an earlier attempt has finished the training
            self._evaluate()
        self.saving.wait(self.step)
        last, inference = self.evaluated[-1], None
        predictions = self.ranks.all_gather_object([each.predictions for each in self.evaluated])
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
            result=mean_over_tasks([each.result for each in self.evaluated]),
            totals=self.meters.totals_over_ranks(self.ranks.max, self.ranks.mean),
            task_results=self.task_results,
            rule_metrics=self._rule_metrics(),
            inference=inference,
        )
        hardware = hardware_of(self.ranks)
        if self.ranks.rank == 0:
            files = RunFolder(self.folder)
            write_json(files.activity, [asdict(layer) for layer in last.activity])
            write_predictions(
                files.predictions, predictions, has_task_column=bool(self.recipe.phases)
            )
            write_json(files.summary, {**summary, "hardware": hardware})
        self.tracker.write(events.Finish(step=self.step, summary=summary))
        return summary

    # ---------------------------------------------------------------------------- state and metrics

    def _state(self) -> dict[str, Any]:
        """The state of this object in a checkpoint; `__init__` restores it. Collective."""
        guard = self.guard.state_dict()  # first: it may drop a batch from the totals
        return {
            "guard": guard,
            "totals": asdict(self.meters.totals_over_ranks(self.ranks.max, self.ranks.mean)),
            "rule_metrics": self._rule_metrics(),
            "learnt": asdict(self.task_results),
        }

    def _rule_metrics(self) -> dict[str, float]:
        return rule_metrics(self.context.rule, self.ranks, self.restored["rule_metrics"])

    def _between_s(self) -> float:
        return sum(self.meters.totals.seconds[name] for name in SECTIONS)

    def epoch_of(self, step: int) -> int:
        return stretch_at(self.context.stretches, step).epoch(step)

    # -------------------------------------------------------------------------------------- reports

    def _drop(self, step: int, reason: str) -> None:
        self.meters.drop(step)
        self._report_skip(step, reason, self.recipe.remedy)

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
        """Report slow ranks and, once per attempt, a long wait of this rank for data."""
        if slow := stragglers(self.meters.busy_s, self.ranks):
            hosts = self.ranks.all_gather_object(socket.gethostname())
            workers = {
                str(rank): {"times": times, "host": hosts[rank]} for rank, times in slow.items()
            }
            self.tracker.write(events.Straggler(step=self.step, workers=workers))
        share = self.meters.totals.share_of_steady_time("data_wait")
        if (
            self.meters.totals.steady_batches >= MIN_STEADY_BATCHES
            and share > MAX_DATA_WAIT_SHARE
            and not self.has_reported_data_wait
        ):
            self.has_reported_data_wait = True
            self.tracker.write(
                events.DataWait(step=self.step, share=share, loader_threads=self.job.loader_threads)
            )

    def _compare_gradients(self, *, epoch: int | None) -> None:
        """Compare the rule's gradient with BPTT's, at the current weights, not at their average.
        `epoch`: the epoch that has ended; None: the start of the run.
        """
        if self.context.compare_gradients is None:
            return
        self.meters.note_peaks()
        with self.meters.between("fidelity"):
            fidelity = self.context.compare_gradients(
                self.backend.network.state_dict(), self.context.rule.state_dict(), step=self.step
            )
        self.meters.forget_peaks()  # those of the comparison, such as the memory of BPTT's graph
        self.tracker.write(
            events.Fidelity(
                step=self.step,
                epoch=epoch,
                temporal_share=fidelity.temporal_share,
                cosines=fidelity.cosines,
            )
        )
