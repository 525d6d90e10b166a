"""One attempt at a run, from where its newest checkpoint stands to its end.

Between two global batches, and only there, a worker looks up from the loop: `Attempt._between_batches` logs, saves, and
stops when asked. Rank 0 decides and tells the others, so that all of them do the same after the same step.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.backend.base import Backend
from pipeline.checkpoint import Checkpoints
from pipeline.data.base import Loader
from pipeline.evaluate import Evaluation, evaluate
from pipeline.job import Job
from pipeline.loop import MicroBatch, train
from pipeline.measure.memory import hardware, memory_now_bytes
from pipeline.measure.meters import Meters, Totals
from pipeline.ranks import Ranks, Refused
from pipeline.recipe import Recipe, Split, write_json
from pipeline.rules.base import Rule
from pipeline.spiking.encode import over_steps
from pipeline.summary import summarise, versions
from pipeline.track.base import Tracker
from pipeline.track.jsonl import read


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything that `worker.compose` built for one process."""

    job: Job
    ranks: Ranks
    tracker: Tracker
    recipe: Recipe
    split: Split
    device: torch.device
    rule: Rule
    backend: Backend
    schedule: Callable[[int], None]
    train_set: Loader
    val_set: Loader
    meters: Meters
    checkpoints: Checkpoints
    steps: int
    """global batches of the whole run"""
    trainer: dict[str, Any] | None
    """what the checkpoint says that was restored; None at a fresh start"""
    began: float
    """unix seconds at the process's first line of work"""


class Attempt:
    """Trains the rest of a run with the parts of this process."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.job, self.ranks, self.tracker, self.recipe = parts.job, parts.ranks, parts.tracker, parts.recipe
        self.meters, self.backend = parts.meters, parts.backend
        self.folder = Path(parts.job.run)
        self.epoch_steps = parts.train_set.steps_per_epoch
        self.step = 0 if parts.trainer is None else parts.trainer["step"]
        if parts.trainer is not None:
            self.meters.totals = Totals(**parts.trainer["totals"])
        self.result: Evaluation | None = None
        self.saved_at = time.monotonic()
        self.stop_asked = False

    def run(self) -> dict[str, Any] | None:
        """The summary (on rank 0), or None when somebody asked to stop."""
        parts = self.parts
        self._tell_start()
        self.meters.forget_peaks()
        try:
            while self.step < parts.steps:
                epoch = self.step // self.epoch_steps
                with closing(self.batches(epoch)) as batches:
                    train(parts.rule, self.backend, parts.schedule, batches, self.recipe.objective.build(), self.meters)
                if self.step == self._epoch_end(epoch):
                    self._end_of_epoch(epoch)
                if self.stop_asked and self.step < parts.steps:
                    return self._stopped()
            return self._finish()
        finally:
            parts.train_set.close()
            parts.val_set.close()

    def _epoch_end(self, epoch: int) -> int:
        return min((epoch + 1) * self.epoch_steps, self.parts.steps)

    # ------------------------------------------------------------------------------------------------------- batches

    def batches(self, epoch: int) -> Generator[tuple[int, Iterator[MicroBatch]]]:
        """The rest of an epoch; what happens between two batches happens here, after the loop asked for the next."""
        end = self._epoch_end(epoch)
        start = (self.step - epoch * self.epoch_steps) * self.recipe.batch_size
        with self.parts.train_set.epoch(epoch, start=start) as loader:
            source = iter(loader)
            while self.step < end:
                yield self.step, self._micro_batches(source)
                self.step += 1
                self._between_batches(epoch, last=self.step == end)
                if self.stop_asked:
                    return

    def _micro_batches(self, source: Iterator[Any]) -> Iterator[MicroBatch]:
        micro, workers = self.parts.split.micro_batch, self.parts.split.workers
        for index in range(self.parts.split.accumulation):
            with self.meters.waiting():
                batch = next(source)
                x_TB = over_steps(batch.x.to(self.parts.device, non_blocking=True), self.recipe.time_steps)
                target_B = batch.target.to(self.parts.device, non_blocking=True)
            first = (index * workers + self.ranks.rank) * micro
            yield MicroBatch(x_TB, target_B, range(first, first + micro), micro / self.recipe.batch_size)

    def _between_batches(self, epoch: int, *, last: bool) -> None:
        """Log, look whether somebody asked to stop, and save where it is time; an epoch's end is saved after its evaluation."""
        recipe = self.recipe
        if self.step % recipe.log_every == 0 or last:
            metrics = self.meters.take(self.ranks.sum)
            if not math.isfinite(metrics["loss"]):
                # Reduced over ranks, so that all of them stop; and a restart would only compute it again.
                raise Refused(
                    f"training: the loss must be finite; got {metrics['loss']} at step {self.step}; lower optimizer.lr?"
                )
            metrics["lr"] = self.backend.optimizer.param_groups[0]["lr"]
            metrics |= {f"rule_{name}": value for name, value in self._figures().items()}
            self.tracker.event("step", step=self.step, epoch=epoch, metrics=metrics, memory_bytes=memory_now_bytes())
        due = recipe.checkpoint_every > 0 and self.step % recipe.checkpoint_every == 0
        self.stop_asked, late = self.ranks.decide(
            (self.folder / "stop").exists(),
            recipe.checkpoint_minutes > 0 and time.monotonic() - self.saved_at > 60 * recipe.checkpoint_minutes,
        )
        if (due or late or self.stop_asked) and not last:
            self._save(score=None)

    def _figures(self) -> dict[str, float]:
        """What the rule says of its last batch, the mean over ranks; collective."""
        figures = self.parts.rule.figures()
        if not figures:
            return {}
        means = self.ranks.mean(torch.tensor(list(figures.values()), dtype=torch.float64, device=self.parts.device))
        return dict(zip(figures, means.tolist(), strict=True))

    # ------------------------------------------------------------------------------------------- epochs and checkpoints

    def _end_of_epoch(self, epoch: int) -> None:
        score = None
        if self.step == self.parts.steps or (epoch + 1) % self.recipe.evaluate_every == 0:
            self.result = result = self._evaluate()
            score = result.top1
            metrics = {name: value for name, value in asdict(result).items() if name != "samples"}
            self.tracker.event("evaluation", sync=True, step=self.step, epoch=epoch, samples=result.samples, metrics=metrics)
        self._save(score=score)

    def _evaluate(self) -> Evaluation:
        limit = self.recipe.evaluate_samples

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            left = None if limit is None else len(range(self.ranks.rank, limit, self.ranks.size))
            with self.parts.val_set.epoch(0) as loader:
                for batch in loader:
                    x_BCHW, target_B = batch.x[:left], batch.target[:left]
                    if left is not None:
                        left -= len(target_B)
                    if len(target_B):
                        yield over_steps(x_BCHW.to(self.parts.device), self.recipe.time_steps), target_B.to(self.parts.device)
                    if left == 0:
                        return

        self.meters.note_peaks()
        with self.ranks.averaged(self.backend.network):
            result = evaluate(self.backend.model, batches(), self.recipe.objective.build(), over_time=self.recipe.over_time)
        self.meters.forget_peaks()  # what evaluation held is not what training needs
        return result

    def _save(self, *, score: float | None) -> None:
        if not all(bool(p.isfinite().all()) for p in self.backend.network.parameters()):  # the same on every rank
            raise Refused(f"training: parameters must be finite to be saved; they are not after step {self.step}")
        totals = self.meters.over_ranks(self.ranks.max)
        mlflow = self.folder / "mlflow.json"
        trainer = {
            "run": self.folder.name,
            "run_id": self.job.run_id,
            "mlflow": json.loads(mlflow.read_text()) if mlflow.exists() else None,
            "study": self.job.study,
            "commit": self.job.commit,
            "epoch": self.step // self.epoch_steps,
            "sample": self.step % self.epoch_steps * self.recipe.batch_size,
            "seed": self.recipe.seed,
            "world_size": self.ranks.size,
            "zero": self.recipe.zero,
            "data_fingerprint": self.job.data_fingerprint,
            "score": score,
            "totals": asdict(totals),
        }
        with self.ranks.averaged(self.backend.network) as buffers:
            saved = self.parts.checkpoints.save(self.step, self.backend, self.parts.rule, trainer, buffers=buffers)
        self.saved_at = time.monotonic()
        self.tracker.event(
            "checkpoint", sync=True, step=self.step, path=str(saved.path), seconds=saved.seconds, bytes=saved.bytes
        )

    # ------------------------------------------------------------------------------------------------------- beginnings

    def _tell_start(self) -> None:
        recipe, split = self.recipe, self.parts.split
        self.tracker.event(
            "start",
            sync=True,
            run=self.folder.name,
            run_id=self.job.run_id,
            recipe=recipe.name,
            rule=self.parts.rule.label,
            study=self.job.study,
            study_parent=self.job.parent,
            seed=recipe.seed,
            world_size=split.workers,
            batch_size=recipe.batch_size,
            micro_batch=split.micro_batch,
            accumulation=split.accumulation,
            parameters=sum(p.numel() for p in self.backend.network.parameters()),
            steps_per_epoch=self.epoch_steps,
            total_steps=self.parts.steps,
            epochs=recipe.epochs,
            samples=self.parts.train_set.samples,
            dropped_per_epoch=self.parts.train_set.samples - self.epoch_steps * recipe.batch_size,
            step=self.step,
            began=self.parts.began,
            time_steps=recipe.time_steps,
            precision=recipe.precision,
            zero=recipe.zero,
            commit=self.job.commit,
            hardware=hardware(),
            versions=versions(),
            data_fingerprint=self.job.data_fingerprint,
            params=recipe.flat(),
            loader_threads=self.job.loader_threads,
            resume_command=self.job.resume_command,
        )

    # ------------------------------------------------------------------------------------------------------------- ends

    def _stopped(self) -> None:
        self.tracker.event("stopped", sync=True, step=self.step, reason="asked to stop", resume_command=self.job.resume_command)

    def _finish(self) -> dict[str, Any]:
        result = self.result or self._evaluate()  # an attempt that died after its last checkpoint has evaluated nothing
        totals = self.meters.over_ranks(self.ranks.max)
        figures = self._figures()
        summary: dict[str, Any] = {}
        if self.ranks.rank == 0:
            summary = {
                "run": self.folder.name,
                "run_id": self.job.run_id,
                "study": self.job.study,
                "rule": self.parts.rule.label,
                "recipe": self.recipe.name,
                "seed": self.recipe.seed,
                "world_size": self.ranks.size,
                "steps": self.step,
                "epochs": math.ceil(self.step / self.epoch_steps),
                **summarise(result, totals, read(self.folder / "journal.jsonl")),
                "rule_figures": figures,
                "loader_threads": self.job.loader_threads,
                "commit": self.job.commit,
                "data_fingerprint": self.job.data_fingerprint,
            }
            write_json(self.folder / "summary.json", {**summary, "hardware": hardware()})
        self.tracker.event("finish", sync=True, step=self.step, **summary)
        return summary
