"""The evaluation of the published network on each task so far. A request to stop or to save
interrupts it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import torch
from torch import Tensor

from pipeline.data.base import Loader
from pipeline.measure.energy import EnergyCounter
from pipeline.train.assemble import TrainContext
from pipeline.train.evaluation import Evaluated, evaluate, inputs, share_of

LOOK_S = 1.0  # seconds between two looks for a request


def evaluate_tasks(
    context: TrainContext,
    *,
    step: int,
    tasks: int,
    counts_operations: bool,
    is_interrupted: Callable[[], bool],
) -> list[Evaluated] | None:
    """One result for each of the first `tasks`, the current one last. None if an evaluation was
    interrupted on any rank. Collective.

    Args:
        step: the step of the run. It selects the pages of the data that are compared with their
            checksums.
        is_interrupted: whether this rank sees a request to stop or to save. Each rank calls it
            about once a second, at its own times, because ranks have different numbers of batches.
    """
    recipe, ranks, network = context.recipe, context.ranks, context.backend.network
    most = share_of(recipe.evaluation.samples, ranks)
    loss_for = recipe.objective.build().labels
    evaluated, joules, was_interrupted = list[Evaluated](), EnergyCounter(ranks.device), False

    def until_interrupted(val_set: Loader) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        nonlocal was_interrupted
        looked_at = time.monotonic()
        for batch in inputs(val_set, recipe.time_steps, ranks.device, most=most, epoch=step):
            context.watchdog.beat()
            yield batch
            if time.monotonic() - looked_at > LOOK_S:
                looked_at = time.monotonic()
                was_interrupted = is_interrupted()
                if was_interrupted:
                    return

    with context.meters.evaluating() as note_peaks, published(context):
        for index, task in enumerate(context.loaders.tasks[:tasks]):
            task.choose_head(network)
            with closing(context.loaders.val(index)) as val_set:
                evaluated.append(
                    evaluate(
                        context.backend.model,
                        until_interrupted(val_set),
                        loss_for,
                        over_time=recipe.over_time,
                        network=network,
                        counts_operations=counts_operations,
                        joules=joules,
                        when_answered=note_peaks,
                    )
                )
            if ranks.max(torch.tensor(float(was_interrupted))):
                return None
    return evaluated


@contextmanager
def published(context: TrainContext) -> Iterator[None]:
    """Inside, the network holds the values that are evaluated and published: its weights, or their
    average if the recipe asks for one, and running statistics averaged over ranks.
    """
    with context.backend.published(), context.ranks.averaged(context.backend.network):
        yield
