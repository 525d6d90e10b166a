"""The composition root of one process: recipe -> data, model, rule, backend, tracker -> loop.

Between two global batches, and only there, a worker looks up from the loop: `Attempt.between_batches` logs, saves,
and stops when asked. Rank 0 decides and tells the others, so that all of them do the same after the same step.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.backend.base import Backend
from pipeline.backend.plain import Plain
from pipeline.checkpoint import CheckpointError, Checkpoints
from pipeline.data.base import Data, Loader
from pipeline.evaluate import Evaluation, evaluate
from pipeline.loop import MicroBatch, train
from pipeline.measure.memory import hardware, memory_now_bytes
from pipeline.measure.meters import Meters, Totals
from pipeline.ranks import Ranks, Refused
from pipeline.recipe import Recipe, Split, write_json
from pipeline.rules.base import Rule, World
from pipeline.spiking.encode import repeat
from pipeline.summary import summarise, versions
from pipeline.track.base import Tracker
from pipeline.track.jsonl import read
from pipeline.weights import load_start
from pipeline.writer import journal, only_writer


@dataclass(frozen=True)
class Job:
    """What every worker of a run is told; it travels as plain values."""

    run: str
    """the run's folder, absolute, on storage that every worker and the driver see"""
    study: str
    data_fingerprint: str
    commit: str
    parent: str | None = None
    """shared by the runs of one comparison"""
    run_id: str = ""
    resume_command: str = ""
    trust: tuple[str, ...] = ()
    threads: int = 1
    """torch's threads in each worker"""
    loader_threads: int = 1


@dataclass(frozen=True)
class Place:
    """Where this worker stands among the others; the process group exists when there are several."""

    rank: int = 0
    workers: int = 1
    device: str = "cpu"


def run(job: Job, place: Place, *, attempt_of: Callable[..., Attempt] | None = None) -> dict[str, Any] | None:
    """Train a run from wherever its folder stands to its end; the summary, or None when it was asked to stop.

    `attempt_of` makes the attempt (None: `Attempt`); benchmarks look over its shoulder.

    Raises:
        Refused: something that the user has to change.
    """
    began = time.time()
    torch.set_num_threads(job.threads)
    folder = Path(job.run)
    ranks = Ranks(place.rank, place.workers, place.device)
    with only_writer(folder, ranks), journal(folder, ranks) as tracker:
        try:
            attempt = (attempt_of or Attempt)(job, place, ranks, folder, tracker, began)
        except (ValueError, CheckpointError) as error:
            raise Refused(str(error)) from error
        return attempt.run()


class Attempt:
    """One attempt at a run in one process."""

    def __init__(self, job: Job, place: Place, ranks: Ranks, folder: Path, tracker: Tracker, began: float) -> None:
        self.began = began
        self.job, self.place, self.ranks, self.folder, self.tracker = job, place, ranks, folder, tracker
        self.device = torch.device(place.device)
        self.recipe = recipe = Recipe.from_json(json.loads((folder / "recipe.json").read_text()), trust=job.trust)
        self.split = recipe.split(place.workers)
        self.data: Data = recipe.data.build()
        ranks.agree(lambda: _check_data(self.data, job))

        _seed(recipe.seed)
        network = build_network(recipe, self.data, self.device)
        self.rule = attached_rule(recipe, network, World(recipe.seed, place.rank, place.workers, ranks.mean))
        if self.rule.update == "objective" and self.split.accumulation > 1:
            raise ValueError(
                f"{recipe.rule.label}: moves the weights at every time step and refuses accumulation; got {self.split}"
            )
        self.backend = build_backend(recipe, network, self.split)
        _seed(recipe.seed + 1 + place.rank)  # dropout and its like: not the same on two ranks

        sizes = {"rank": place.rank, "world": place.workers, "micro_batch": self.split.micro_batch, "threads": job.loader_threads}
        self.train_set: Loader = self.data.train(seed=recipe.seed, batch_size=recipe.batch_size, **sizes)
        self.val_set: Loader = self.data.val(**sizes)
        self.epoch_steps = self.train_set.steps_per_epoch
        self.steps = total_steps(recipe, self.epoch_steps)
        self.schedule = recipe.schedule.build(self.backend.optimizer, self.steps)

        self.meters = Meters(network, batch_size=recipe.batch_size, device=self.device)
        self.checkpoints = Checkpoints(
            folder / "checkpoints",
            attempt=f"{os.getpid()}-{time.time_ns():x}" if place.rank == 0 else "",
            keep=recipe.keep,
            rank=place.rank,
            on_quarantine=lambda path, reason: tracker.event("quarantine", path=str(path), reason=reason),
        )
        self.checkpoints.attempt = ranks.agree(lambda: self.checkpoints.attempt)
        trainer = self.checkpoints.restore(self.backend, self.rule)
        self.step: int = 0 if trainer is None else trainer["step"]
        self.last_top1: float | None = None if trainer is None else trainer["score"]
        if trainer is not None:
            self.meters.totals = Totals(**trainer["totals"])
        self.saved_at, self.saved_step = time.monotonic(), self.step

    def run(self) -> dict[str, Any] | None:
        self._tell_start()
        try:
            while self.step < self.steps:
                epoch = self.step // self.epoch_steps
                with closing(self.batches(epoch)) as batches:
                    train(self.rule, self.backend, self.schedule, batches, self.recipe.objective.build(), self.meters)
                if self.step < min((epoch + 1) * self.epoch_steps, self.steps):
                    return self._stopped()
                self._end_of_epoch(epoch)
            return self._finish()
        finally:
            self.train_set.close()
            self.val_set.close()

    # ------------------------------------------------------------------------------------------------------- batches

    def batches(self, epoch: int) -> Generator[tuple[int, Iterator[MicroBatch]]]:
        """The rest of an epoch; what happens between two batches happens here, after the loop asked for the next."""
        end = min((epoch + 1) * self.epoch_steps, self.steps)
        start = (self.step - epoch * self.epoch_steps) * self.recipe.batch_size
        with self.train_set.epoch(epoch, start=start) as loader:
            source = iter(loader)
            while self.step < end:
                yield self.step, self._micro_batches(source)
                self.step += 1
                if not self._between_batches(epoch, last=self.step == end):
                    return

    def _micro_batches(self, source: Iterator[Any]) -> Iterator[MicroBatch]:
        micro, workers = self.split.micro_batch, self.split.workers
        for index in range(self.split.accumulation):
            with self.meters.waiting():
                batch = next(source)
                x_TB = repeat(batch.x.to(self.device, non_blocking=True), self.recipe.time_steps)
                target_B = batch.target.to(self.device, non_blocking=True)
            first = (index * workers + self.place.rank) * micro
            yield MicroBatch(x_TB, target_B, range(first, first + micro), micro / self.recipe.batch_size)

    def _between_batches(self, epoch: int, *, last: bool) -> bool:
        """Log, save and look whether somebody asked to stop; False when training must stop here."""
        recipe = self.recipe
        if self.step % recipe.log_every == 0 or last:
            metrics = self.meters.take(self.ranks.sum)
            if not math.isfinite(metrics["loss"]):
                raise FloatingPointError(f"training: loss must be finite; got {metrics['loss']} at step {self.step}")
            metrics["lr"] = self.backend.optimizer.param_groups[0]["lr"]
            self.tracker.event("step", step=self.step, epoch=epoch, metrics=metrics, memory_bytes=memory_now_bytes())
        due = recipe.checkpoint_every > 0 and self.step % recipe.checkpoint_every == 0
        stop, late = self.ranks.decide(
            (self.folder / "stop").exists(),
            recipe.checkpoint_minutes > 0 and time.monotonic() - self.saved_at > 60 * recipe.checkpoint_minutes,
        )
        if (due or late or stop) and not last:
            self._save(score=None)
        return not stop or last

    # ------------------------------------------------------------------------------------------- epochs and checkpoints

    def _end_of_epoch(self, epoch: int) -> None:
        is_last = self.step == self.steps
        score = None
        if is_last or (epoch + 1) % self.recipe.evaluate_every == 0:
            result = self._evaluate()
            score = self.last_top1 = result.top1
            metrics = {name: value for name, value in asdict(result).items() if name != "samples"}
            self.tracker.event("evaluation", sync=True, step=self.step, epoch=epoch, samples=result.samples, metrics=metrics)
            self.result = result
        self._save(score=score)

    def _evaluate(self) -> Evaluation:
        self.ranks.average_buffers(self.backend.network)
        limit = self.recipe.evaluate_samples

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            left = None if limit is None else len(range(self.place.rank, limit, self.place.workers))
            with self.val_set.epoch(0) as loader:
                for batch in loader:
                    x_BCHW, target_B = batch.x[:left], batch.target[:left]
                    if left is not None:
                        left -= len(target_B)
                    if len(target_B):
                        yield repeat(x_BCHW.to(self.device), self.recipe.time_steps), target_B.to(self.device)
                    if left == 0:
                        return

        return evaluate(self.backend.model, batches(), self.recipe.objective.build(), over_time=self.recipe.over_time)

    def _save(self, *, score: float | None) -> None:
        self.ranks.average_buffers(self.backend.network)
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
            "world_size": self.place.workers,
            "zero": self.recipe.zero,
            "data_fingerprint": self.job.data_fingerprint,
            "score": score,
            "totals": asdict(totals),
        }
        saved = self.checkpoints.save(self.step, self.backend, self.rule, trainer)
        self.saved_at, self.saved_step = time.monotonic(), self.step
        self.tracker.event(
            "checkpoint", sync=True, step=self.step, path=str(saved.path), seconds=saved.seconds, bytes=saved.bytes
        )

    # ------------------------------------------------------------------------------------------------------- beginnings

    def _tell_start(self) -> None:
        recipe, split = self.recipe, self.split
        self.tracker.event(
            "start",
            sync=True,
            run=self.folder.name,
            run_id=self.job.run_id,
            recipe=recipe.name,
            rule=self.rule.label,
            study=self.job.study,
            study_parent=self.job.parent,
            seed=recipe.seed,
            world_size=split.workers,
            batch_size=recipe.batch_size,
            micro_batch=split.micro_batch,
            accumulation=split.accumulation,
            parameters=sum(p.numel() for p in self.backend.network.parameters()),
            steps_per_epoch=self.epoch_steps,
            total_steps=self.steps,
            epochs=recipe.epochs,
            samples=self.train_set.samples,
            dropped_per_epoch=self.train_set.samples - self.epoch_steps * recipe.batch_size,
            step=self.step,
            began=self.began,
            time_steps=recipe.time_steps,
            precision=recipe.precision,
            zero=recipe.zero,
            commit=self.job.commit,
            hardware=hardware(),
            versions=versions(),
            data_fingerprint=self.job.data_fingerprint,
            params=recipe.flat(),
            resume_command=self.job.resume_command,
        )

    # ------------------------------------------------------------------------------------------------------------- ends

    def _stopped(self) -> None:
        self.tracker.event("stopped", sync=True, step=self.step, reason="asked to stop", resume_command=self.job.resume_command)

    def _finish(self) -> dict[str, Any]:
        totals = self.meters.over_ranks(self.ranks.max)
        summary: dict[str, Any] = {}
        if self.place.rank == 0:
            summary = {
                "run": self.folder.name,
                "run_id": self.job.run_id,
                "study": self.job.study,
                "rule": self.rule.label,
                "recipe": self.recipe.name,
                "seed": self.recipe.seed,
                "world_size": self.place.workers,
                "steps": self.step,
                "epochs": math.ceil(self.step / self.epoch_steps),
                **summarise(self.result, totals, read(self.folder / "journal.jsonl")),
                "commit": self.job.commit,
                "data_fingerprint": self.job.data_fingerprint,
            }
            write_json(self.folder / "summary.json", {**summary, "hardware": hardware()})
        self.tracker.event("finish", sync=True, step=self.step, **summary)
        return summary


# ----------------------------------------------------------------------------------------------------------- the pieces


def build_network(recipe: Recipe, data: Data, device: torch.device) -> nn.Module:
    """The recipe's network on its device, started from `init` where the recipe names one."""
    classes = recipe.model.kwargs.get("classes", data.classes)
    if classes != data.classes:
        raise ValueError(f"recipe: model and data must have the same classes; got {classes} and {data.classes}")
    network: nn.Module = recipe.model.build()
    if recipe.init is not None:
        load_start(network, Path(recipe.init))
    return network.to(device)


def attached_rule(recipe: Recipe, network: nn.Module, world: World) -> Rule:
    """The recipe's rule on its network; refuses what does not fit together."""
    rule: Rule = recipe.rule.build()
    rule.check_steps(recipe.time_steps)
    rule.attach(network, world=world, over_time=recipe.over_time)
    return rule


def build_backend(recipe: Recipe, network: nn.Module, split: Split) -> Backend:
    def optimizer_of(network: nn.Module) -> torch.optim.Optimizer:
        try:
            return recipe.optimizer.build(network)
        except TypeError as error:  # timm passes what it does not know on to the optimizer
            raise ValueError(f"{recipe.optimizer.label}: {error}") from error

    if recipe.backend == "plain":
        return Plain(network, optimizer_of, precision=recipe.precision, clip_norm=recipe.clip_norm)
    from pipeline.backend.deepspeed import DeepSpeed

    return DeepSpeed(
        network,
        optimizer_of,
        micro_batch=split.micro_batch,
        zero=recipe.zero,
        precision=recipe.precision,
        clip_norm=recipe.clip_norm,
    )


def total_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    steps = recipe.epochs * steps_per_epoch
    return steps if recipe.stop_after is None else min(steps, recipe.stop_after)


def _check_data(data: Data, job: Job) -> None:
    data.check()
    if data.fingerprint() != job.data_fingerprint:
        raise ValueError(
            f"data: this run was launched on content {job.data_fingerprint[:12]}; got {data.fingerprint()[:12]}: "
            "another file lies where the recipe points"
        )


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (what a user's own parts may draw from)
    torch.manual_seed(seed)
