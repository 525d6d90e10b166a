"""What more workers are worth: measured, on equal machines.

    speed-up   = images/s of n workers / images/s of the fewest
    efficiency = speed-up / (n / the fewest)

images/s are a run's steady ones. The global batch is the recipe's, however many workers share it,
and falls on them in the micro-batches that the recipe asks for: of a run in others, as where memory
ran out, images/s are not those of its workers alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from pipeline.core.units import counted
from pipeline.recipe.recipe import Split
from pipeline.report.figure import Cell, Table
from pipeline.report.places import machine
from pipeline.report.spread import spread_of
from pipeline.report.study import Study, StudyRun

SAID = (
    "Measured, not a model: steady images/s of finished runs, the mean over those of one rule and"
    " number of workers; the global batch is the same for any number. Efficiency is the speed-up"
    " over the fewest workers, divided by how many times as many there are. Set beside one another"
    " are runs of one study key on equal machines, all with cores of their own or all without; a"
    " run in other micro-batches than its recipe asks for, as where memory ran out, is left out."
)
_COLUMNS = (
    "rule",
    "workers",
    "images/s, measured",
    "its deviation",
    "speed-up",
    "efficiency",
    "over",
    "runs",
    "study",
    "machine",
    "cores",
)


def scaling(study: Study) -> Table | None:
    """A row for each rule and number of workers; None where no rule has finished on two numbers of
    them.
    """
    alike: dict[str, dict[int, list[StudyRun]]] = {}
    for group in study.groups:
        for run in group.finished:
            if run.workers and run.value("images_per_s") and _is_split_as_written(run, run.workers):
                alike.setdefault(_but_for_workers(run), {}).setdefault(run.workers, []).append(run)
    rows = [
        row for by_workers in alike.values() if len(by_workers) > 1 for row in _rows(by_workers)
    ]
    return Table(columns=_COLUMNS, rows=tuple(rows)) if rows else None


def _rows(by_workers: Mapping[int, Sequence[StudyRun]]) -> Iterator[tuple[Cell, ...]]:
    fewest = min(by_workers)
    alone = 0.0
    for workers, runs in sorted(by_workers.items()):
        found = spread_of(
            [value for run in runs if (value := run.value("images_per_s")) is not None]
        )
        assert found is not None, "runs without images/s are left out"
        alone = alone or found.mean
        speed_up = found.mean / alone
        efficiency = speed_up * fewest / workers
        told = (counted(fewest, "worker"), found.runs, runs[0].study[:8], machine(runs[0].hardware))
        cores = "its own" if runs[0].trained_on[0].own_cores else "shared"
        yield (
            runs[0].rule,
            workers,
            found.mean,
            found.deviation,
            speed_up,
            efficiency,
            *told,
            cores,
        )


def _is_split_as_written(run: StudyRun, workers: int) -> bool:
    """In the recipe's micro-batches, and from first to last on the same: else its images/s are of
    several.
    """
    batch_size, most = run.recipe.get("batch_size"), run.recipe.get("micro_batch")
    if (
        len(run.trained_on) != 1 or not isinstance(batch_size, int) or batch_size % workers
    ):  # the journal tells a recipe as text
        return False
    (on,) = run.trained_on
    return on.micro_batch == Split.of(batch_size, workers=workers, most=most).micro_batch


def _but_for_workers(run: StudyRun) -> str:
    """What must be equal: the study, the rule as its recipe has it, and the machine with what each
    worker has of it.
    """
    (on,) = run.trained_on
    rule = run.recipe.get("rule")
    written = rule if isinstance(rule, Mapping) else run.rule
    kind = [run.study, written, on.loader_threads, on.own_cores, dict(on.hardware)]
    return json.dumps(kind, sort_keys=True, default=str)
