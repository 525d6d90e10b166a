"""The state of a run, derived from its journal and the driver's lock. No process keeps it.

The states determine which entries of a suite are done. A diverged run counts as done; a diverged
trial ranks last.
"""

import fcntl
import math
from collections.abc import Mapping
from pathlib import Path

from pipeline.core.run_folder import RunFolder
from pipeline.recipe.recipe import read_json
from pipeline.recipe.suite import measured_in, runs_of, sources_in
from pipeline.track.events import KINDS, State, kind_of
from pipeline.track.journal import last

_ENDS = tuple(name for name, kind in KINDS.items() if kind.state is not None)


def state_of(run_dir: Path) -> State:
    """`finished` after a finish event; `running` while a driver holds the run; else the last state.

    `interrupted`: the last attempt has no end (killed, power cut). `new`: no attempt has begun.
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

    This call takes a shared lock for an instant, so a driver must try for its lock more than once.
    """
    try:
        with RunFolder(run_dir).driver_lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False  # closing the file has released the shared lock


def is_over(run: Path, *, is_needed: bool) -> bool:
    """Whether a suite has nothing left to do for a run.

    A run that diverged would diverge again, so it counts as done. `is_needed`: other runs take its
    weights, so it must have finished.
    """
    return state_of(run) in (("finished",) if is_needed else ("finished", "diverged"))


def suite_entries(suite: Path) -> dict[str, Path]:
    """The folder of each run of a suite and the file of each measurement, by name, in their order.

    Raises:
        ValueError: suite.json is damaged.
    """
    return {**runs_of(suite), **measured_in(suite)}


def done_entries(suite: Path) -> dict[str, Path]:
    """The entries of a suite that are done; see `suite_entries`."""
    needed, runs = sources_in(suite), runs_of(suite)
    return {
        name: place
        for name, place in suite_entries(suite).items()
        if (is_over(place, is_needed=name in needed) if name in runs else place.exists())
    }


def top1_of(run: Path) -> float | None:
    """The top-1 accuracy of a finished run in 0..1; None for a run that diverged."""
    return None if state_of(run) == "diverged" else read_json(RunFolder(run).summary)["top1"]


def best(top1: Mapping[str, float | None]) -> str:
    """The name of the best trial; of equal trials the first. A diverged trial (None) ranks last."""
    worth = {name: -math.inf if value is None else value for name, value in top1.items()}
    return max(worth, key=lambda name: worth[name])
