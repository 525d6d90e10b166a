"""The state of a run, and the conditions under which it was trained: workers, micro-batch, machine
and loaders. The state is not stored, but derived from the run's files and the driver's lock.

The states of a suite's runs determine which entries of the suite are done. A diverged run counts as
done, unless other runs need its weights. A diverged trial ranks last.

A run may continue under other conditions: other workers, another machine, other loader threads,
reserved cores, or (after memory ran out) a smaller micro-batch. Times and memory peaks of such a
run belong to all of its conditions together.
"""

import fcntl
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.run_folder import RunFolder
from pipeline.recipe.recipe import read_json
from pipeline.recipe.suite import measured_in, runs_of, sources_in
from pipeline.track.events import KINDS, Start, State, kind_of
from pipeline.track.journal import last

_ENDS = tuple(name for name, kind in KINDS.items() if kind.state is not None)


def state_of(run_dir: Path) -> State:
    """`finished` after a finish event; else `running` while a driver is alive; else the state of
    the newest event that has one.

    `interrupted`: the last attempt was killed before it could write how it ended. `new`: no attempt
    has begun. Without an event that has a state, a run is `finished` if it has a summary.
    """
    files = RunFolder(run_dir)
    newest = last(files.journal, *_ENDS)
    if newest is None:
        state: State = "finished" if files.summary.exists() else "new"
    else:
        state = kind_of(newest).state or "new"
    return "running" if state != "finished" and is_driven(run_dir) else state


def is_driven(run_dir: Path) -> bool:
    """Whether a live process holds the flock of `driver.lock`.

    This call itself holds a shared lock for a moment, so a driver must try more than once to lock.
    """
    try:
        with RunFolder(run_dir).driver_lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False  # the end of `with` has released the shared lock


def is_over(run: Path, *, is_needed: bool) -> bool:
    """Whether a suite has nothing left to do for a run.

    A diverged run counts as done, because it would diverge again. If `is_needed`, other runs start
    from the weights of this run, so the run must have finished.
    """
    return state_of(run) in (("finished",) if is_needed else ("finished", "diverged"))


def suite_entries(suite: Path) -> dict[str, Path]:
    """The entries of a suite by name: the folders of its runs, then the files of its measurements.

    Raises:
        ValueError: suite.json is damaged.
    """
    return {**runs_of(suite), **measured_in(suite)}


def done_entries(suite: Path) -> dict[str, Path]:
    """The entries of a suite that are done; see `suite_entries`. A measurement is done if its file
    exists.
    """
    needed, runs = sources_in(suite), runs_of(suite)
    return {
        name: path
        for name, path in suite_entries(suite).items()
        if (is_over(path, is_needed=name in needed) if name in runs else path.exists())
    }


def top1_of(run: Path) -> float | None:
    """The top-1 accuracy of a finished run in 0..1; None for a diverged run."""
    return None if state_of(run) == "diverged" else read_json(RunFolder(run).summary)["top1"]


def best(top1: Mapping[str, float | None]) -> str:
    """The name of the trial with the best accuracy; the first one if several are equal. A diverged
    trial (None) ranks last.
    """
    scores = {name: -math.inf if value is None else value for name, value in top1.items()}
    return max(scores, key=lambda name: scores[name])


# -------------------------------------------------------------------------- the conditions of a run


FIELDS = ("world_size", "micro_batch", "hardware", "loader_threads", "own_cores")


def trained_on(events: Sequence[Mapping[str, Any]], *, steps: int | None) -> list[dict[str, Any]]:
    """The FIELDS of each start in a journal that contributed to the result. The oldest start is
    first, and each combination of values occurs once.

    A start does not count if a later start began at the same step or earlier, because all of its
    steps were repeated. A start at the last step does not count either, unless no other start does.

    Args:
        steps: the number of steps of the finished run; None: the run is not finished, and its
            newest start always counts.
    """
    starts: list[Mapping[str, Any]] = []
    for start in (event for event in events if kind_of(event) is Start):
        starts = [*(earlier for earlier in starts if earlier["step"] < start["step"]), start]
    trained = [start for start in starts if steps is None or start["step"] < steps]
    conditions = [_fields(start) for start in trained or starts[-1:]]
    return [fields for i, fields in enumerate(conditions) if fields not in conditions[:i]]


def conditions_of(
    summary: Mapping[str, Any], events: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """The conditions of a finished run, from `trained_on` in its summary, or else from its journal.

    If neither has them, the result is the conditions at the end of the run, which are other fields
    of the summary. Values that are missing in the result are also taken from these fields.
    """
    return [
        _fields({**summary, **{name: value for name, value in fields.items() if value is not None}})
        for fields in summary.get("trained_on")
        or trained_on(events, steps=summary.get("steps"))
        or [{}]
    ]


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The FIELDS of a start or a summary. `own_cores` is True if cores are reserved."""
    fields = {name: values.get(name) for name in FIELDS}
    return {**fields, "own_cores": bool(fields["own_cores"])}
