"""Read spiketrain's studies, runs, metric histories and artifacts from an MLflow store.

Reading never creates a store, and changes an SQLite file only to undo an interrupted write. An
SQLite file is read with SQL and without MLflow: MLflow's client (3.17.2) would create a missing
file, and took 1.9 s to list 500 runs. A server is read through MLflow's client. An unreadable store
raises `StoreError` within seconds, and an unreadable artifact raises `ArtifactError`.
"""

import json
import math
import os
import re
import sqlite3
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote, urlparse

from pipeline.core.run_folder import RunFolder
from pipeline.report.results import (
    ReportError,
    Run,
    describe_machine,
    frame,
    is_silent,
    read_runs,
    run_of,
)
from pipeline.report.titles import MACHINE, title_of
from pipeline.track.events import KIND, Event, Start, Step, from_dict
from pipeline.track.journal import Record, read_thinned
from pipeline.track.mlflow import REPORT, REPORT_DATA
from pipeline.track.mlflow_store import (
    KIND_TAG,
    PARENT_OF,
    SQLITE,
    connect,
    reason,
    without_password,
)
from pipeline.track.run_state import State

if TYPE_CHECKING:
    import pandas as pd

FILES = RunFolder("")  # a run's artifacts have the names of its files
JOURNAL = FILES.journal.name
ARTIFACTS = (
    *(
        file.name
        for file in (*FILES.early_artifacts, FILES.journal, *FILES.late_artifacts)
        if file.suffix != ".npz"
    ),
    REPORT_DATA,
    REPORT,
)
MAX_BYTES = 64 << 20  # larger artifacts are not read whole
LOCK_TIMEOUT_S = 2.0
_THINNED_BYTES = 8 << 20  # the approximate size of a thinned journal
_STATES: dict[str, State] = {"RUNNING": "running", "FINISHED": "finished", "FAILED": "failed"}
_SUITE_ARTIFACTS = (REPORT, REPORT_DATA)  # of a suite's MLflow run; users may delete this run
_SUMMARY = "summary/"  # prefix of the metrics with the numbers of a summary
_PAGE_SIZE = 200  # runs per response, so that a busy server answers in time
T_ = TypeVar("T_")


class StoreError(ReportError):
    """A store cannot be read. The message is one line for a user."""


class ArtifactError(ReportError):
    """An artifact of a readable store cannot be read. The message is one line for a user."""


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """One training run in MLflow. Times are unix seconds."""

    id: str  # MLflow's
    name: str
    experiment: str
    status: str  # MLflow's: RUNNING, FINISHED, FAILED, KILLED
    started: float
    newest: float  # the latest of its start, its end and its newest metric
    tags: Mapping[str, str] = field(repr=False)
    metrics: Mapping[str, float] = field(repr=False)  # newest values
    params: Mapping[str, str] = field(default_factory=dict, repr=False)  # the recipe's fields

    @property
    def state(self) -> State:
        """The state as in a run's folder. MLflow's status of a diverged run is FAILED."""
        if self.status == "FAILED" and self.tags.get("spiketrain.diverged") == "true":
            return "diverged"
        return _STATES.get(self.status, "stopped")

    @property
    def short(self) -> str:
        """The beginning of the id, for URLs."""
        return self.id[:8]

    @property
    def study(self) -> str:
        return self.tags.get("spiketrain.study", "")

    @property
    def rule(self) -> str:
        return self.tags.get("spiketrain.rule", "")

    @property
    def seed(self) -> str:
        return self.tags.get("spiketrain.seed", "")

    @property
    def parent(self) -> str | None:
        """The id of the MLflow run of its suite."""
        return self.tags.get(PARENT_OF)


@dataclass(frozen=True, kw_only=True)
class StoredStudy:
    """The runs of one study key in one experiment."""

    experiment: str
    study: str
    rules: tuple[str, ...]
    protocol: str  # `tuned, optimizer.lr`, `trials of optimizer.lr`; empty if only rules differ
    seeds: tuple[str, ...]
    states: Mapping[str, int]  # number of runs by state; silent: running without recent reports
    newest: float  # the largest `newest` of the runs
    title: str  # in words
    fields: Mapping[str, str] = field(repr=False)  # of a run's recipe, and its machine


@dataclass(frozen=True, kw_only=True)
class SentJournal:
    """A run's journal as stored in MLflow, with every `every`-th point of the learning curve."""

    events: Sequence[Event] = ()
    every: int = 1


@dataclass(frozen=True)
class Point:
    step: int
    time: float
    value: float


class Store(ABC):
    """An MLflow store. All methods may raise `StoreError`."""

    @abstractmethod
    def runs(self) -> list[StoredRun]:
        """All spiketrain runs, newest start first."""

    @abstractmethod
    def history(self, run_id: str, metric: str, *, since: int = -1) -> list[Point]:
        """A metric of one run after the step `since`, in the order of steps."""

    @abstractmethod
    def _read(self, run_id: str, name: str, read: Callable[[Path], T_]) -> T_ | None:
        """Apply `read` to an artifact's file; None if the file does not exist."""

    def text(self, run_id: str, name: str) -> str | None:
        """The text of an artifact of a run or of a suite's MLflow run; None without the artifact.

        Raises:
            StoreError: `name` is not one of `ARTIFACTS`, or the store cannot be read.
            ArtifactError: the artifact cannot be read.
        """
        if name not in ARTIFACTS:  # a name must not lead out of the run's folder
            raise StoreError(f"store: an artifact must be {', '.join(ARTIFACTS)}; got {name!r}")
        return self._read(run_id, name, _read_text)

    def journal(self, run_id: str) -> SentJournal:
        """A run's journal, thinned if it is long (ImageNet journals have about 100 MB).

        Without a journal, the result has no events.

        Raises:
            ArtifactError: the journal cannot be read.
        """
        return self._read(run_id, JOURNAL, _read_journal) or SentJournal()


def runs_of_store(store: Store) -> list[Run]:
    """All runs of a store, from tags and metrics. Their recipes have only the protocol."""
    names = ("rule", "study", "seed", "world_size", "micro_batch", "hardware", "commit")
    runs: list[Run] = []
    for stored in store.runs():
        summary: dict[str, Any] = {}
        for key, value in stored.metrics.items():
            if key.startswith(_SUMMARY):
                *path, last = key.removeprefix(_SUMMARY).split("/")
                inner = summary
                for name in path:
                    inner = inner.setdefault(name, {})
                inner[last] = value
        start = start_of(stored)
        fields = {name: start[name] for name in names if start[name] not in (None, "")}
        runs.append(
            run_of(
                stored.name,
                state=stored.state,
                starts=[start],
                summary={**summary, **fields} if summary else None,
                recipe={"protocol": stored.tags.get("spiketrain.protocol", "shared")},
                started=stored.started,
                last_heard=stored.newest if stored.state == "running" else None,
            )
        )
    return runs


def results(source: str | os.PathLike[str] = "runs") -> "pd.DataFrame":
    """All runs of a folder or an MLflow store as a pandas frame with one row per run.

        frame = pipeline.results("runs/")
        frame[frame.state == "finished"].groupby(["study", "rule"])["top1"].agg(["mean", "std"])

    `pipeline.report.metrics.METRICS` lists the quantities. Units are bytes, seconds and joules;
    shares are in 0..1. NaN: not measured. The columns `recipe` and `summary` contain the objects in
    recipe.json and summary.json; `summary` is None for an unfinished run. From a store, `recipe`
    has only the protocol, and `summary` only numbers and the values of some tags.

    Args:
        source: a folder of runs, the SQLite file of an MLflow store or its URI, or the address of
            an MLflow server.

    Raises:
        ValueError: the source cannot be read, or a file of a run is damaged.
    """
    uri = os.fspath(source)
    if "://" in uri or Path(uri).is_file():
        return frame(runs_of_store(open_store(uri)))
    if not Path(uri).is_dir():
        raise ValueError(f"results: source must be a folder of runs or a store; got {uri}")
    return frame(read_runs(Path(uri)))


def start_of(stored: StoredRun) -> Record:
    """The `start` event of a run, reconstructed from its tags."""
    tags = _tags(stored, "spiketrain.")
    numbers = ("seed", "world_size", "micro_batch", "attempt")
    return {
        KIND: Start.kind,
        "time": stored.started,
        "step": 0,
        "hardware": hardware_of(stored),
        **{name: tags.get(name) for name in ("rule", "study", "commit")},
        **{name: _value(tags.get(name)) for name in numbers},
    }


def hardware_of(stored: StoredRun) -> dict[str, Any]:
    return {name: _value(text) for name, text in _tags(stored, "hardware.").items()}


def _tags(stored: StoredRun, prefix: str) -> dict[str, str]:
    """The tags whose names begin with `prefix`, by the rest of the name."""
    return {
        name.removeprefix(prefix): text
        for name, text in stored.tags.items()
        if name.startswith(prefix)
    }


def studies(runs: Iterable[StoredRun]) -> list[StoredStudy]:
    """Group runs by experiment and study, the most recently active study first."""
    groups: dict[tuple[str, str], list[StoredRun]] = {}
    for run in runs:
        groups.setdefault((run.experiment, run.study), []).append(run)
    return sorted(map(_study, groups.values()), key=lambda study: study.newest, reverse=True)


def _study(members: Sequence[StoredRun]) -> StoredStudy:
    first = members[0]
    fields = {**first.params, MACHINE: describe_machine(hardware_of(first))}
    names = filter(None, (run.tags.get("spiketrain.recipe") for run in members))
    return StoredStudy(
        experiment=first.experiment,
        study=first.study,
        rules=tuple(sorted({run.rule for run in members})),
        protocol=next(filter(None, (_protocol(run.tags) for run in members)), ""),
        seeds=tuple(sorted({run.seed for run in members}, key=lambda seed: (len(seed), seed))),
        states=Counter(
            "silent" if is_silent(run.state, run.newest) else run.state for run in members
        ),
        newest=max(run.newest for run in members),
        title=title_of(fields, names, first.experiment),
        fields=fields,
    )


def _protocol(tags: Mapping[str, str]) -> str:
    tuned = ", ".join(re.findall(r"[\w.]+", tags.get("spiketrain.tuned", "")))
    texts = {"tuned": f"tuned, {tuned}", "trial": f"trials of {tuned}"}
    return texts.get(tags.get("spiketrain.protocol", ""), "")


def _value(text: str | None) -> str | int | None:
    return int(text) if text and text.isdecimal() else text


def _read_text(file: Path) -> str:
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise ArtifactError(
            f"{file.name} must have at most {MAX_BYTES >> 20} MiB; got {size >> 20} MiB: open the"
            " artifact with MLflow"
        )
    return file.read_text(errors="replace")


def _read_journal(file: Path) -> SentJournal:
    size = file.stat().st_size
    every = 1 if size <= MAX_BYTES else math.ceil(size / _THINNED_BYTES)
    records = read_thinned(file, Step.kind, every=every)
    try:
        return SentJournal(events=list(map(from_dict, records)), every=every)
    except ValueError as error:
        raise ArtifactError(f"its {JOURNAL} in MLflow cannot be read: {error}") from error


# ------------------------------------------------------------------------------------------ SQLite

# The spiketrain runs that are not deleted, in experiments that are not deleted. The schema is that
# of MLflow 3.17.2.
_RUNS = f"""
    select r.run_uuid, r.name, e.name, r.status, r.start_time,
        coalesce(r.end_time, r.start_time), json_group_object(t.key, t.value),
        (select json_group_object(p.key, p.value) from params p where p.run_uuid = r.run_uuid)
    from runs r
    join experiments e on e.experiment_id = r.experiment_id
    join tags k on k.run_uuid = r.run_uuid and k.key = '{KIND_TAG}' and k.value = 'run'
    join tags t on t.run_uuid = r.run_uuid
    where r.lifecycle_stage = 'active' and e.lifecycle_stage = 'active'
    group by r.run_uuid order by r.start_time desc
"""
_LATEST = "select run_uuid, key, value, is_nan, timestamp from latest_metrics"
_ARTIFACT_URI = "select artifact_uri from runs where run_uuid = ? and lifecycle_stage = 'active'"
_HISTORY = """
    select step, timestamp, value, is_nan from metrics
    where run_uuid = ? and key = ? and step > ? order by step
"""


class SqliteStore(Store):
    """An MLflow store in a file, opened for each query."""

    def __init__(self, file: Path) -> None:
        self.file = file.absolute()

    def runs(self) -> list[StoredRun]:
        with self._connection() as connection:
            rows = connection.execute(_RUNS).fetchall()
            latest = connection.execute(_LATEST).fetchall()
        times: dict[str, int] = {}
        metrics: dict[str, dict[str, float]] = {}
        for run, key, value, is_nan, time in latest:
            metrics.setdefault(run, {})[key] = math.nan if is_nan else value
            times[run] = max(time, times.get(run, 0))
        return [
            StoredRun(
                id=run,
                name=name or run,
                experiment=experiment,
                status=status,
                started=(started or 0) / 1000,
                newest=max(ended or 0, times.get(run, 0)) / 1000,
                tags=json.loads(tags),
                metrics=metrics.get(run, {}),
                params=json.loads(params),
            )
            for run, name, experiment, status, started, ended, tags, params in rows
        ]

    def history(self, run_id: str, metric: str, *, since: int = -1) -> list[Point]:
        with self._connection() as connection:
            rows = connection.execute(_HISTORY, (run_id, metric, since))
            return [
                Point(step, time / 1000, math.nan if is_nan else value)
                for step, time, value, is_nan in rows
            ]

    def _read(self, run_id: str, name: str, read: Callable[[Path], T_]) -> T_ | None:
        with self._connection() as connection:
            row = connection.execute(_ARTIFACT_URI, (run_id,)).fetchone()
        if row is None:
            return None
        uri = urlparse(row[0])
        if uri.scheme not in ("", "file"):
            raise StoreError(
                f"store {self.file}: artifacts must be files; got {uri.scheme}://: start an MLflow"
                " server for the store and name its address"
            )
        root = Path(os.path.realpath(unquote(uri.path)))  # resolve() raises for circular links
        path = Path(os.path.realpath(root / name))
        if path.parent != root:
            raise ArtifactError(
                f"store {self.file}: {name} of run {run_id} must be in {root}; got a link to {path}"
            )
        try:
            return read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ArtifactError(
                f"store {self.file}: {path} cannot be read ({error.strerror}); check the file"
            ) from error

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            size = self.file.stat().st_size
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._refused(
                "does not exist; launch a run, or set MLFLOW_TRACKING_URI to another store"
            ) from error
        except OSError as error:
            raise self._refused(_UNREADABLE.format(error.strerror)) from error
        if self.file.is_dir():
            raise self._refused("is a folder; name the file in it, such as mlflow.db")
        if not size:
            raise self._refused(
                "is empty, because no run was sent to it; `spiketrain sync RUN` sends a run"
            )
        # SQLite itself undoes an interrupted write, for which it must be allowed to write. It opens
        # a file without write permission read-only.
        uri = f"file:{quote(str(self.file))}?mode=rw"
        try:
            with closing(sqlite3.connect(uri, uri=True, timeout=LOCK_TIMEOUT_S)) as connection:
                connection.execute("pragma query_only = on")
                connection.execute("select 1 from alembic_version")
                yield connection
        except sqlite3.OperationalError as error:
            known = (meaning for words, meaning in _MEANINGS.items() if words in str(error))
            raise self._refused(next(known, _UNREADABLE).format(error)) from error
        except sqlite3.DatabaseError as error:
            raise self._refused(
                f"is damaged ({error}); rename it: `spiketrain sync RUN` then fills a new store"
                " from the journals"
            ) from error

    def _refused(self, why: str) -> StoreError:
        return StoreError(f"store {self.file} {why}")


_UNREADABLE = "cannot be read ({}); check the path and the permissions of the file and folder"
# The meaning of an SQLite message, by words of the message.
_MEANINGS = {
    "locked": (
        f"was locked by another process for over {LOCK_TIMEOUT_S:g} s; try again, or end that"
        " process"
    ),
    "no such table: alembic_version": (
        "is not a complete MLflow store; try again, name another store, or rename the file:"
        " `spiketrain sync RUN` then fills a new store"
    ),
    "no such": (
        "is incomplete or of another version of MLflow ({}); try again, then mlflow db upgrade"
        " sqlite:///FILE"
    ),
}


# ------------------------------------------------------------------------------------------ server


class ServerStore(Store):
    """An MLflow server, read through MLflow's client."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        # `connect` disables retries.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")

    def runs(self) -> list[StoredRun]:
        condition = f"tags.`{KIND_TAG}` = 'run'"
        with self._store_errors():
            from mlflow.utils import get_results_from_paginated_fn as all_pages

            client = connect(self.uri)
            experiments = all_pages(
                lambda size, token: client.search_experiments(max_results=size, page_token=token),
                _PAGE_SIZE,
            )
            names = {each.experiment_id: each.name for each in experiments}
            found = names and all_pages(
                lambda size, token: client.search_runs(
                    list(names), condition, max_results=size, page_token=token
                ),
                _PAGE_SIZE,
            )
        runs = (_stored(run, names[run.info.experiment_id]) for run in found)
        return sorted(runs, key=lambda run: run.started, reverse=True)

    def history(self, run_id: str, metric: str, *, since: int = -1) -> list[Point]:
        with self._store_errors():
            recorded = connect(self.uri).get_metric_history(run_id, metric)
        points = (Point(each.step, each.timestamp / 1000, each.value) for each in recorded)
        return sorted((each for each in points if each.step > since), key=lambda each: each.step)

    def _read(self, run_id: str, name: str, read: Callable[[Path], T_]) -> T_ | None:
        with self._store_errors():
            client = connect(self.uri)
        try:
            with tempfile.TemporaryDirectory() as folder:
                if (
                    name in _SUITE_ARTIFACTS
                    and client.get_run(run_id).info.lifecycle_stage != "active"
                ):
                    return None  # MLflow would still return a deleted run's artifacts
                if name not in {file.path for file in client.list_artifacts(run_id)}:
                    return None
                return read(Path(client.download_artifacts(run_id, name, folder)))
        except ArtifactError:
            raise
        except Exception as error:  # MLflow, its transport and the artifact store raise any type
            if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
                return None
            with self._store_errors():
                client.get_run(run_id)  # raises if the whole store does not answer
            raise ArtifactError(
                f"store {without_password(self.uri)}: {name} of run {run_id} cannot be read"
                f" ({reason(self.uri, error)}); check the artifact store"
            ) from error

    @contextmanager
    def _store_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # MLflow and its transport raise any type
            raise StoreError(
                f"store {without_password(self.uri)} does not answer as an MLflow server"
                f" ({reason(self.uri, error)}); check the server and MLFLOW_TRACKING_URI"
            ) from error


def _stored(run: Any, experiment: str) -> StoredRun:
    # In MLflow 3.17.2, `metrics` has no times.
    times = [metric.timestamp for metric in run.data._metric_objs]
    return StoredRun(
        id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        experiment=experiment,
        status=run.info.status,
        started=(run.info.start_time or 0) / 1000,
        newest=max(run.info.end_time or 0, run.info.start_time or 0, *times) / 1000,
        tags=dict(run.data.tags),
        metrics=dict(run.data.metrics),
        params=dict(run.data.params),
    )


def open_store(uri: str) -> Store:
    """Open a store by tracking URI: `sqlite:///FILE`, the path of such a file, or `http://...`.

    Raises:
        StoreError: the URI has another scheme.
    """
    if uri.startswith(("http://", "https://")):
        return ServerStore(uri)
    if uri.startswith(SQLITE) or "://" not in uri:
        return SqliteStore(Path(uri.removeprefix(SQLITE)))
    raise StoreError(
        "store: the URI must be sqlite:///FILE or the address of a server; got"
        f" {without_password(uri)}: start a server with mlflow server --backend-store-uri URI"
    )
