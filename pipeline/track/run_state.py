"""The state of a run. It is not stored, but derived from the run's files and the driver's lock.

The states of a suite's runs determine which entries of the suite are done. A diverged run counts as
done, unless other runs need its weights. A diverged trial ranks last.
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
