"""The micro-batches of a global batch, as a rule learns from them: here, mixed, laid out over time,
and answered by a teacher.

B batch
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.recipe.phases import Stretch
from pipeline.spiking.encode import over_steps
from pipeline.train.context import TrainContext
from pipeline.train.elastic import draw_for
from pipeline.train.loop import MicroBatch


def micro_batches(
    parts: TrainContext, source: Iterator[Any], *, step: int, stretch: Stretch
) -> Iterator[MicroBatch]:
    """Of global batch `step`, this rank's: as many as are accumulated, of the next batches of
    `source`.
    """
    recipe, split, meters = parts.recipe, parts.split, parts.meters
    for index in range(split.accumulation):
        with meters.part("data_wait"):
            batch = next(source)
        with meters.part("transfer"):
            x_B = batch.x.to(parts.device, non_blocking=True)
            target_B = batch.target.to(parts.device, non_blocking=True)
            first = (index * split.workers + parts.ranks.rank) * split.micro_batch
            if len(parts.sizes) > 1:
                draw_for(recipe.seed, step=step, row=first)
            rows = range(first, first + split.micro_batch)
            if parts.mixing is not None:
                place = {"seed": recipe.seed, "step": step, "rows": rows}
                classes = parts.loaders.tasks[stretch.index].data.classes
                x_B, target_B = parts.mixing(x_B, target_B, classes=classes, **place)
            x_TB = over_steps(x_B, recipe.time_steps)
        teacher_BK = None
        if parts.teaching is not None:
            with meters.part("teacher"):
                teacher_BK = parts.teaching(x_B, batch.index, stretch.epoch(step))
        yield MicroBatch(x_TB, target_B, rows, split.micro_batch / recipe.batch_size, teacher_BK)
