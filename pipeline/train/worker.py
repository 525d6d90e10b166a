"""One process of a run: it composes its parts and trains with them, again where it can go on by
itself, to the end.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from pipeline.core.cores import near_cores, own_cores
from pipeline.core.errors import UserError, as_user_error
from pipeline.core.torch_settings import configure_torch
from pipeline.measure.clock import Clock, charge_collectives
from pipeline.measure.memory import is_out_of_memory
from pipeline.recipe.recipe import Split
from pipeline.track.events import Smaller
from pipeline.track.journal import Tracker
from pipeline.train.assemble import compose
from pipeline.train.backend.collectives import Ranks
from pipeline.train.build import build_mixing
from pipeline.train.context import TrainContext
from pipeline.train.elastic import check_accumulation, steady
from pipeline.train.guards.anomaly import Rollback
from pipeline.train.guards.oom import HalveMicroBatch, fitted, halve
from pipeline.train.guards.watchdog import Watchdog
from pipeline.train.job import Job, RankInfo, note_refusal, raise_refusal
from pipeline.train.trainer import Trainer
from pipeline.train.writer_lock import journal, only_writer


def run(
    job: Job, place: RankInfo, *, attempt_of: Callable[[TrainContext], Trainer] = Trainer
) -> dict[str, Any] | None:
    """Train a run from wherever its folder stands to its end; the summary (on rank 0), or None when
    it was asked to stop.

    `attempt_of` makes the attempt; benchmarks look over its shoulder.

    Raises:
        UserError: something that the user has to change.
    """
    began = time.time()
    configure_torch(job.threads, torch.device(place.device))
    ranks = Ranks(place.rank, place.workers, place.device)
    clock = Clock(ranks.device)
    with ExitStack() as held:
        if job.own_cores and ranks.device.type == "cpu":
            ranks.all_or_raise(lambda: held.enter_context(own_cores(job.threads)))
        held.enter_context(near_cores(ranks.device, at_least=max(job.threads, job.loader_threads)))
        return _run(job, place, ranks, clock, began, attempt_of)


def _run(
    job: Job,
    place: RankInfo,
    ranks: Ranks,
    clock: Clock,
    began: float,
    attempt_of: Callable[[TrainContext], Trainer],
) -> dict[str, Any] | None:
    folder = Path(job.run)
    watchdog = Watchdog(folder, rank=ranks.rank, patience_s=60 * job.hang_minutes)
    with only_writer(folder, ranks), charge_collectives(clock), watchdog:
        while True:
            try:
                with journal(folder, ranks) as tracker:
                    ranks.all_or_raise(lambda: raise_refusal(folder))
                    return _attempt(job, place, ranks, tracker, watchdog, clock, began, attempt_of)
            except (Rollback, HalveMicroBatch):
                pass  # every rank begins again
            clock.take()  # batches that are rolled back, and that nobody has asked for yet
            gc.collect()  # the attempt that ended goes, and what it held
            if ranks.device.type == "cuda":
                torch.cuda.empty_cache()
            began = time.time()


def _attempt(
    job: Job,
    place: RankInfo,
    ranks: Ranks,
    tracker: Tracker,
    watchdog: Watchdog,
    clock: Clock,
    began: float,
    attempt_of: Callable[[TrainContext], Trainer],
) -> dict[str, Any] | None:
    try:
        return _run_in_memory(
            attempt_of(compose(job, place, ranks, tracker, watchdog, clock, began)), ranks, tracker
        )
    except UserError:
        raise  # every rank knows
    except ValueError as error:
        ranks.raise_if_gone(error)
        if (
            ranks.size > 1
            # the others wait for this rank: only its death frees them, and then the note speaks to
            # all
        ):
            note_refusal(Path(job.run), error)
            raise
        raise as_user_error(error) from error


def _run_in_memory(attempt: Trainer, ranks: Ranks, tracker: Tracker) -> dict[str, Any] | None:
    try:
        return attempt.run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        parts = attempt.parts
        samples = halve(
            Path(parts.job.run), parts.split, split_of=lambda limit: _split_of(parts, limit)
        )
        tracker.write(Smaller(step=attempt.step, micro_batch=samples, reason=str(error)))
        if ranks.size > 1:
            raise  # the others wait for this rank: only its death frees them
        raise HalveMicroBatch from None  # without the frames, which hold what has to go


def _split_of(parts: TrainContext, limit: int) -> Split:
    """As the next attempt will cut a batch, or refuse to, where at most so many samples may be held
    at a time.
    """
    recipe = steady(fitted(parts.recipe, limit), parts.backend.network, parts.sizes)
    check_accumulation(recipe, parts.rule, parts.sizes)
    for size in parts.sizes:
        build_mixing(recipe, recipe.split(size))
    return recipe.split(parts.ranks.size)
