"""The main function of a worker process: trains from the newest checkpoint to the end of the run,
and starts again after a fault that the run survives (recovery.py).
"""

import gc
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import distributed

from pipeline.core.cpu_affinity import reserve_cores
from pipeline.core.errors import UserError, as_user_error
from pipeline.core.torch_settings import configure_torch
from pipeline.measure.clock import Clock, charge_collectives
from pipeline.measure.memory import is_out_of_memory
from pipeline.track import events
from pipeline.train.assemble import Process, TrainContext, assemble
from pipeline.train.backend.collectives import Ranks
from pipeline.train.elastic import fit_to_sizes
from pipeline.train.guards.watchdog import Watchdog
from pipeline.train.job import Job, RankInfo, note_refusal, raise_refusal
from pipeline.train.recovery import HalveMicroBatch, Rollback, StartAgain
from pipeline.train.trainer import Trainer
from pipeline.train.writer_lock import journal, only_writer


def run(
    job: Job, rank_info: RankInfo, *, trainer_of: Callable[[TrainContext], Trainer] = Trainer
) -> dict[str, Any] | None:
    """Train a run to its end. Returns the summary on rank 0 and {} on other ranks; None if a stop
    was requested.

    Raises:
        UserError: the user has to change something.
        Exception: any other error that ends the attempt, such as a fault of storage.
    """
    began, folder = time.time(), Path(job.run)
    configure_torch(job.threads, torch.device(rank_info.device))
    ranks = Ranks(rank_info.rank, rank_info.workers, rank_info.device)
    clock = Clock(ranks.device)
    watchdog = Watchdog(folder, rank=ranks.rank, patience_s=60 * job.hang_minutes)
    with ExitStack() as stack:
        if job.own_cores and ranks.device.type == "cpu":
            ranks.all_or_raise(lambda: stack.enter_context(reserve_cores(job.threads)))
        stack.enter_context(only_writer(folder, ranks))
        stack.enter_context(charge_collectives(clock))
        stack.enter_context(watchdog)
        while True:
            with suppress(StartAgain), journal(folder, ranks) as tracker:
                ranks.all_or_raise(lambda: raise_refusal(folder))
                return _attempt(
                    Process(
                        job=job,
                        rank_info=rank_info,
                        ranks=ranks,
                        tracker=tracker,
                        watchdog=watchdog,
                        clock=clock,
                        began=began,
                    ),
                    trainer_of,
                )
            clock.take()  # drops the seconds of batches that the next attempt repeats or skips
            gc.collect()  # frees the memory of the previous attempt
            torch.cuda.empty_cache()  # has no effect on a CPU
            began = time.time()


def _attempt(
    process: Process, trainer_of: Callable[[TrainContext], Trainer]
) -> dict[str, Any] | None:
    try:
        trainer = trainer_of(assemble(process))
        try:
            return trainer.run()
        except Rollback as rollback:
            _note_rollback(trainer, rollback)
            raise
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            _note_halving(trainer, str(error))
            if process.ranks.size > 1:
                raise  # other ranks wait for this rank until its process ends
            raise HalveMicroBatch from None
    except UserError:
        raise  # every rank raises it
    except ValueError as error:
        # Before Ray (2.60) ends workers, it removes their process group. Errors that follow from
        # this are no errors of the user.
        if process.ranks.size > 1 and not distributed.is_initialized():
            raise RuntimeError("worker: Ray removed its process group during training") from error
        if process.ranks.size == 1:
            raise as_user_error(error) from error
        # Other ranks wait for this rank until its process ends. The next attempt reads the note.
        note_refusal(Path(process.job.run), error)
        raise


def _note_rollback(trainer: Trainer, rollback: Rollback) -> None:
    """Decide which batches the next attempt skips, and write the decision. Collective.

    Raises:
        UserError: the recipe allows no more rollbacks. The error is a Diverged if batches caused
            the rollback.
    """
    recipe, epoch = trainer.recipe, trainer.epoch_of(rollback.step)
    to_step = trainer.saving.newest_step()
    decisions = trainer.context.decisions.after_rollback(
        rollback, recipe, to_step=to_step, epoch=epoch
    )
    trainer.ranks.broadcast_object(lambda: decisions.write(trainer.folder))
    trainer.tracker.write(
        events.Rollback(
            step=rollback.step,
            epoch=epoch,
            to=to_step,
            reason=rollback.reason,
            advice=recipe.remedy if rollback.skips else "",
        )
    )


def _note_halving(trainer: Trainer, reason: str) -> None:
    """Decide on the micro-batch of the next attempt, and write the decision.

    Raises:
        ValueError: the recipe accepts no smaller micro-batch. Only this rank raises it.
    """
    context = trainer.context
    decisions = context.decisions.after_out_of_memory(
        context.recipe,
        samples=context.split.micro_batch,
        ranks=context.ranks.size,
        check=lambda recipe: fit_to_sizes(
            recipe, context.backend.network, context.rule, context.rank_info.possible_sizes
        ),
    )
    decisions.write(trainer.folder)
    trainer.tracker.write(
        events.Smaller(
            step=trainer.step, micro_batch=cast(int, decisions.micro_batch), reason=reason
        )
    )
