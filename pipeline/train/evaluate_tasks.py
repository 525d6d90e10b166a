"""A run's network as it is published, evaluated on each of its tasks so far, unless somebody asks
to stop or save meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import TypeVar

import torch

from pipeline.measure.energy import EnergyCounter
from pipeline.train.context import TrainContext
from pipeline.train.evaluation import Evaluated, evaluate, inputs
from pipeline.train.guards.watchdog import Watchdog

LOOK_S = 1.0
"""between two looks whether somebody asks for something"""

T_ = TypeVar("T_")


def assess(
    parts: TrainContext,
    *,
    step: int,
    tasks: int,
    counts_operations: bool,
    is_asked: Callable[[], bool],
) -> list[Evaluated] | None:
    """On each of the first `tasks`, the one at hand last; None where somebody asked to stop or to
    save. Collective.

    `is_asked` says whether somebody does, as far as this rank knows. It is called about once a
    second, by each rank for itself. `step`: of the run, at each of which other pages of the data
    are compared with their checksums.
    """
    recipe, ranks, network = parts.recipe, parts.ranks, parts.backend.network
    limit = recipe.evaluation.samples
    most = None if limit is None else len(range(ranks.rank, limit, ranks.size))
    loss_for = recipe.objective.build().labels
    found, joules = list[Evaluated](), EnergyCounter(parts.device)
    lookout, is_left = _Lookout(parts.watchdog, is_asked), False
    with parts.meters.evaluating() as note_peaks, published(parts):
        for index, task in enumerate(parts.loaders.tasks[:tasks]):
            task.choose_head(network)
            with closing(parts.loaders.val(index)) as val_set:
                batches = lookout.over(
                    inputs(val_set, recipe.time_steps, parts.device, most=most, epoch=step)
                )
                about = {
                    "network": network,
                    "counts_operations": counts_operations,
                    "joules": joules,
                    "when_answered": note_peaks,
                }
                found.append(
                    evaluate(
                        parts.backend.model, batches, loss_for, over_time=recipe.over_time, **about
                    )
                )
            is_left = bool(ranks.max(torch.tensor(float(lookout.has_left))))
            if is_left:
                break
    return None if is_left else found


class _Lookout:
    """Whether somebody asks to stop or to save; each rank looks by itself between batches, as they
    have not as many.
    """

    def __init__(self, watchdog: Watchdog, is_asked: Callable[[], bool]) -> None:
        self.has_left = False
        self._watchdog, self._is_asked = watchdog, is_asked

    def over(self, batches: Iterable[T_]) -> Iterator[T_]:
        """All of them, or fewer."""
        looked_at = time.monotonic()
        for batch in batches:
            self._watchdog.beat()
            yield batch
            if time.monotonic() - looked_at > LOOK_S:
                looked_at = time.monotonic()
                if self._is_asked():
                    self.has_left = True
                    return


@contextmanager
def published(parts: TrainContext) -> Iterator[None]:
    """Inside, the network is what is evaluated and published: an average of its weights where the
    recipe asks for one.
    """
    with parts.backend.published(), parts.ranks.averaged(parts.backend.network):
        yield
