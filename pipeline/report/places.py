"""What a run was trained on, in words: machines, workers, loaders, and how a batch fell on them, in
turn where they changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.core.units import counted
from pipeline.report.study_run import StudyRun, TrainedOn

NOT_SAID = "not known"


def places(run: StudyRun, *, between: str = ", ") -> str:
    """`a cpu, 2 cores, 1 thread, 2 workers, in micro-batches of 64, then a cpu, 2 cores, 1 thread,
    1 worker`

    Loader threads are told where they changed on the way.
    """
    told = [
        between.join(filter(None, (machine(each.hardware), _workers(run, each))))
        for each in run.trained_on
    ]
    return ", then ".join(told) or machine({})


def machine(hardware: Mapping[str, Any]) -> str:
    """What computed: the GPU of each worker, or the CPU with its cores and the threads of torch."""
    if not hardware:
        return "a machine that is not known"
    if hardware.get("gpu") not in (None, "none"):
        return str(hardware["gpu"])
    counts = [
        counted(hardware[name], name[:-1])
        for name in ("cores", "threads")
        if isinstance(hardware.get(name), int)
    ]
    return ", ".join([str(hardware.get("cpu", "a CPU")), *counts])


def micro_batches(run: StudyRun) -> str:
    """Samples that a worker holds at a time, and how many times in a batch: `128`, `64 × 2`."""
    told = [_micro_batch(each, _accumulated(run, each)) for each in run.trained_on]
    return ", then ".join(dict.fromkeys(told)) or NOT_SAID


def loaders(on: TrainedOn) -> str:
    """`with 1 loader thread`; nothing where it is not known."""
    return (
        "" if on.loader_threads is None else f"with {counted(on.loader_threads, 'loader thread')}"
    )


def _workers(run: StudyRun, on: TrainedOn) -> str:
    told = [
        "" if on.workers is None else counted(on.workers, "worker"),
        f"in micro-batches of {on.micro_batch}" if (_accumulated(run, on) or 1) > 1 else "",
        "each on cores of its own" if on.own_cores else "",
        loaders(on) if len({each.loader_threads for each in run.trained_on}) > 1 else "",
    ]
    return ", ".join(filter(None, told))


def _micro_batch(on: TrainedOn, accumulated: int | None) -> str:
    if on.micro_batch is None:
        return NOT_SAID
    return (
        f"{on.micro_batch} × {accumulated}"
        if accumulated and accumulated > 1
        else str(on.micro_batch)
    )


def _accumulated(run: StudyRun, on: TrainedOn) -> int | None:
    """Micro-batches of a worker in a batch; None where the batch is not known, as the journal alone
    tells a recipe as text.
    """
    batch = run.recipe.get("batch_size")
    if not isinstance(batch, int) or not on.workers or not on.micro_batch:
        return None
    return batch // (on.workers * on.micro_batch)
