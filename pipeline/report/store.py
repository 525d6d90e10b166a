"""What an MLflow store holds of our runs, for somebody who looks on: studies, runs, the history of
a metric, an artifact.

Looking never makes or changes a store. An SQLite file is read as it lies there, read-only and
without MLflow, whose client (3.17.2) would make a missing file and its schema, and took 1.9 s to
list 500 runs; a server is asked through MLflow's client. Whatever is wrong with a store ends within
seconds in a `StoreError`, one sentence that names it and says what to do; with one artifact of it,
in an `ArtifactError`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pipeline.report.runs import ReportError
from pipeline.report.silence import is_silent
from pipeline.track.connect import SQLITE, without_password
from pipeline.track.files import KNOWN
from pipeline.track.journal import Event, read, read_thinned
from pipeline.track.publish import REPORT, REPORT_DATA
from pipeline.track.state import State

ARTIFACTS = (*(name for name in KNOWN if not name.endswith(".npz")), REPORT_DATA, REPORT)
"""what `Store.text` may be asked for"""


MOST_BYTES = 64 << 20
"""of an artifact that is read whole: it is shown to a person"""
_THINNED_BYTES = 8 << 20
"""about so much of the curve of a longer journal is kept"""
_STATES: dict[str, State] = {"RUNNING": "running", "FINISHED": "finished", "FAILED": "failed"}


class StoreError(ReportError):
    """A store cannot be read; one line for a user."""


class ArtifactError(ReportError):
    """One run's artifact cannot be read, though its store can; one line for a user."""


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """One training run in MLflow. Times are unix seconds."""

    id: str
    """MLflow's"""
    name: str
    experiment: str
    study: str
    rule: str
    seed: str
    state: str
    """MLflow's: RUNNING, FINISHED, FAILED, KILLED; what is shown of it is `state_of`"""
    parent: str | None
    """the id of the run that stands for its suite"""
    started: float
    newest: float
    """of its newest metric, its end, or its start before there is any"""
    tags: Mapping[str, str] = field(repr=False)
    metrics: Mapping[str, float] = field(repr=False)
    """the newest value of each; empty in a list of studies"""


@dataclass(frozen=True, kw_only=True)
class StoredStudy:
    """Runs of one study key in one experiment."""

    experiment: str
    study: str
    rules: tuple[str, ...]
    protocol: str
    """`tuned, optimizer.lr`, or `trials of optimizer.lr`; empty where only the rule differs"""
    seeds: tuple[str, ...]
    states: Mapping[str, int]
    """how many runs are in each state; silent are those that go on by what MLflow says and nobody
    hears of
    """
    parents: tuple[str, ...]
    newest: float


@dataclass(frozen=True, kw_only=True)
class Told:
    """A run's journal as it was sent."""

    events: Sequence[Event] = ()
    every: int = 1
    """of the points of its curve that it told, one of so many is here"""


@dataclass(frozen=True)
class Point:
    step: int
    time: float
    value: float


class Store(Protocol):
    """An MLflow store, opened anew for each question. All may raise `StoreError`."""

    def listed(self) -> list[StoredRun]:
        """Every run of ours, without metrics."""
        ...

    def runs(self, study: str) -> list[StoredRun]:
        """The runs of a study key, with the newest value of each metric, the one started last
        first.
        """
        ...

    def history(self, run_id: str, metric: str, *, since: int = -1) -> list[Point]:
        """A metric of one run after the step `since`, in the order of steps."""
        ...

    def text(self, run_id: str, name: str) -> str | None:
        """An artifact, one of `ARTIFACTS`, of a run that was found; None where it has none of that
        name (yet).

        A suite's run is known by its id alone: where it was deleted, its report is None.

        Raises: ArtifactError where this one cannot be read.
        """
        ...

    def journal(self, run_id: str) -> Told:
        """A run's journal, its curve thinned where it is long (of ImageNet it has some 100 MB);
        none where there is none (yet).

        Raises: ArtifactError where it cannot be read.
        """
        ...


def open_store(uri: str) -> Store:
    """A store by its tracking URI, `sqlite:///FILE`, `http://...` or `https://...`; an SQLite file
    may be named by its path.

    Raises:
        StoreError: it is of another kind.
    """
    if uri.startswith(("http://", "https://")):
        from pipeline.report.store_server import ServerStore

        return ServerStore(uri)
    if uri.startswith(SQLITE) or "://" not in uri:
        from pipeline.report.store_sqlite import SqliteStore

        return SqliteStore(Path(uri.removeprefix(SQLITE)))
    raise StoreError(
        f"store {without_password(uri)} must be sqlite:///FILE or the address of a server; start"
        " one for it: mlflow server --backend-store-uri URI"
    )


def state_of(run: StoredRun) -> State:
    """As its folder tells it. For MLflow what diverged has FAILED, which a tag tells apart, and
    what was stopped is KILLED.
    """
    if run.state == "FAILED" and run.tags.get("spiketrain.diverged") == "true":
        return "diverged"
    return _STATES.get(run.state, "stopped")


def studies(runs: Iterable[StoredRun]) -> list[StoredStudy]:
    """What `Store.listed` found, by study, the one that something happened in last first."""
    groups: dict[tuple[str, str], list[StoredRun]] = {}
    for run in runs:
        groups.setdefault((run.experiment, run.study), []).append(run)
    found = [
        StoredStudy(
            experiment=experiment,
            study=study,
            rules=tuple(sorted({run.rule for run in members})),
            protocol=next(
                filter(None, (_protocol(run.tags) for run in members)), ""
            ),  # some may be older than the tag
            seeds=tuple(sorted({run.seed for run in members}, key=lambda seed: (len(seed), seed))),
            states=dict(sorted(Counter(map(_state_listed, members)).items())),
            parents=tuple(sorted({run.parent for run in members if run.parent})),
            newest=max(run.newest for run in members),
        )
        for (experiment, study), members in groups.items()
    ]
    return sorted(found, key=lambda study: study.newest, reverse=True)


def _protocol(tags: Mapping[str, str]) -> str:
    tuned = ", ".join(re.findall(r"[\w.]+", tags.get("spiketrain.tuned", "")))
    return {"tuned": f"tuned, {tuned}", "trial": f"trials of {tuned}"}.get(
        tags.get("spiketrain.protocol", ""), ""
    )


def _state_listed(run: StoredRun) -> str:
    state = state_of(run)
    return "silent" if is_silent(state, run.newest) else state


def journal_at(file: Path) -> Told:
    """Raises: OSError."""
    size = file.stat().st_size
    if size <= MOST_BYTES:
        return Told(events=read(file))
    every = math.ceil(size / _THINNED_BYTES)
    return Told(events=read_thinned(file, "step", every=every), every=every)


def refuse_unknown_artifact(name: str) -> None:
    """Only what we put there is read: no name leads out of a run's folder of artifacts.

    Raises:
        StoreError: another name.
    """
    if name not in ARTIFACTS:
        raise StoreError(f"store: an artifact must be {', '.join(ARTIFACTS)}; got {name!r}")
