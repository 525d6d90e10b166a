"""What more workers are worth: measured, on equal machines.

    speed-up   = images/s of n workers / images/s of the fewest
    efficiency = speed-up / (n / the fewest)

images/s are a run's steady ones. The global batch is the recipe's, however many workers share it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from pipeline.report.figure import Cell, Table
from pipeline.report.places import counted, machine
from pipeline.report.spread import spread_of
from pipeline.report.study import Study, StudyRun

SAID = (
    "Measured, not a model: steady images/s of finished runs, the mean over those of one rule and number of workers; the global "
    "batch is the same for any number. Efficiency is the speed-up over the fewest workers, divided by how many times as many "
    "there are. Set beside one another are runs of one study key on equal machines, all with cores of their own or all without."
)
_COLUMNS = (
    "rule", "workers", "images/s, measured", "its deviation", "speed-up", "efficiency", "over", "runs", "study", "machine",
    "cores",
)  # fmt: skip


def scaling(study: Study) -> Table | None:
    """A row for each rule and number of workers; None where no rule has finished on two numbers of them."""
    alike: dict[str, dict[int, list[StudyRun]]] = {}
    for group in study.groups:
        for run in group.finished:
            if run.workers and run.value("images_per_s") and len(run.trained_on) == 1:  # else its images/s are of several
                alike.setdefault(_but_for_workers(run), {}).setdefault(run.workers, []).append(run)
    rows = [row for by_workers in alike.values() if len(by_workers) > 1 for row in _rows(by_workers)]
    return Table(columns=_COLUMNS, rows=tuple(rows)) if rows else None


def _rows(by_workers: Mapping[int, Sequence[StudyRun]]) -> Iterator[tuple[Cell, ...]]:
    fewest = min(by_workers)
    alone = 0.0
    for workers, runs in sorted(by_workers.items()):
        found = spread_of([value for run in runs if (value := run.value("images_per_s")) is not None])
        assert found is not None, "runs without images/s are left out"
        alone = alone or found.mean
        speed_up = found.mean / alone
        efficiency = speed_up * fewest / workers
        told = (counted(fewest, "worker"), found.runs, runs[0].study[:8], machine(runs[0].hardware))
        cores = "its own" if runs[0].trained_on[0].own_cores else "shared"
        yield (runs[0].rule, workers, found.mean, found.deviation, speed_up, efficiency, *told, cores)


def _but_for_workers(run: StudyRun) -> str:
    """What must be equal: the study, the rule as its recipe has it, and the machine with what each worker has of it."""
    (on,) = run.trained_on
    hardware = dict(on.hardware)
    if hardware.get("gpu") not in (None, "none"):
        hardware.pop("gpus", None)  # each worker has one, and Ray Train lets it see those of the others on its node
    rule = run.recipe.get("rule")
    written = rule if isinstance(rule, Mapping) else run.rule
    kind = [run.study, written, on.loader_threads, on.own_cores, hardware]
    return json.dumps(kind, sort_keys=True, default=str)
