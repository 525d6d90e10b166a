"""An SQLite store of MLflow, read as a file: read-only, and by SQL, as its schema (checked on
3.17.2) is a simple one.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlparse

from pipeline.report.store import (
    MOST_BYTES,
    ArtifactError,
    Point,
    StoredRun,
    StoreError,
    Told,
    journal_at,
    refuse_unknown_artifact,
)
from pipeline.track.files import JOURNAL
from pipeline.track.hierarchy import KIND_TAG, PARENT_OF

LOCKED_S = 2.0
MAKING_S = 60.0
"""A file that was changed so lately may be a store that is being made: MLflow (3.17.2) makes its
tables, and then, as it brings them up to date, the one by which a store is known."""
_READABLE = "are the file and its folder readable to you?"
Read = TypeVar("Read")

# Tags of the runs that we made, in experiments that nobody deleted.
_RUNS = f"""
    select r.run_uuid, r.name, e.name, r.status, r.start_time, coalesce(r.end_time, r.start_time), t.key, t.value
    from runs r
    join experiments e on e.experiment_id = r.experiment_id
    join tags k on k.run_uuid = r.run_uuid and k.key = '{KIND_TAG}' and k.value = 'run'
    join tags t on t.run_uuid = r.run_uuid
    where r.lifecycle_stage = 'active' and e.lifecycle_stage = 'active'
"""
_PLACE = "select artifact_uri from runs where run_uuid = ? and lifecycle_stage = 'active'"
_OF_STUDY = (
    " and exists (select 1 from tags s where s.run_uuid = r.run_uuid and s.key = 'spiketrain.study'"
    " and s.value = ?)"
)


class SqliteStore:
    """See `Store`."""

    def __init__(self, file: Path) -> None:
        self.file = file.absolute()

    def listed(self) -> list[StoredRun]:
        with self._connection() as connection:
            newest = dict(
                connection.execute(
                    "select run_uuid, max(timestamp) from latest_metrics group by run_uuid"
                ).fetchall()
            )
            return _runs(connection.execute(_RUNS).fetchall(), newest, {})

    def runs(self, study: str) -> list[StoredRun]:
        with self._connection() as connection:
            rows = connection.execute(_RUNS + _OF_STUDY, (study,)).fetchall()
            newest: dict[str, int] = {}
            metrics: dict[str, dict[str, float]] = {}
            for run in {row[0] for row in rows}:
                found = connection.execute(
                    "select key, value, is_nan, timestamp from latest_metrics where run_uuid = ?",
                    (run,),
                )
                for key, value, is_nan, time in found:
                    metrics.setdefault(run, {})[key] = float("nan") if is_nan else value
                    newest[run] = max(newest.get(run, 0), time)
        return sorted(_runs(rows, newest, metrics), key=lambda run: run.started, reverse=True)

    def history(self, run_id: str, metric: str, *, since: int = -1) -> list[Point]:
        query = (
            "select step, timestamp, value, is_nan from metrics where run_uuid = ? and key = ? and"
            " step > ? order by step"
        )
        with self._connection() as connection:
            rows = connection.execute(query, (run_id, metric, since)).fetchall()
        return [
            Point(step, time / 1000, float("nan") if is_nan else value)
            for step, time, value, is_nan in rows
        ]

    def text(self, run_id: str, name: str) -> str | None:
        refuse_unknown_artifact(name)
        return self._read(run_id, name, self._whole)

    def journal(self, run_id: str) -> Told:
        return self._read(run_id, JOURNAL, journal_at) or Told()

    def _whole(self, path: Path) -> str:
        if path.stat().st_size > MOST_BYTES:
            raise ArtifactError(
                f"store {self.file}: {path} has over {MOST_BYTES >> 20} MiB; look at it by hand"
            )
        return path.read_text(errors="replace")

    def _read(self, run_id: str, name: str, read: Callable[[Path], Read]) -> Read | None:
        """What `read` makes of the file of an artifact; None where there is none."""
        with self._connection() as connection:
            row = connection.execute(_PLACE, (run_id,)).fetchone()
        if row is None:
            return None
        place = urlparse(row[0])
        if place.scheme not in ("", "file"):
            raise StoreError(
                f"store {self.file}: its artifacts are at {place.scheme}://; start a server on it"
                " and name that"
            )
        root = Path(
            os.path.realpath(unquote(place.path))
        )  # Path.resolve() raises where links lead in a circle
        path = Path(os.path.realpath(root / name))
        if path.parent != root:
            raise ArtifactError(
                f"store {self.file}: {name} of run {run_id} is a link that leads out of {root};"
                " look at it by hand"
            )
        try:
            return read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ArtifactError(
                f"store {self.file}: {path} cannot be read ({error.strerror}); look at it by hand"
            ) from error

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """What SQLite says of a file that is none of its own, or of MLflow's, becomes a
        sentence.
        """
        facts = self._facts()
        if facts.st_size == 0:
            raise StoreError(
                f"store {self.file} is empty, nothing was delivered yet; `spiketrain sync RUN`"
                " fills it"
            )
        try:
            with closing(self._opened()) as connection:
                yield connection
        except sqlite3.OperationalError as error:
            is_new = time.time() - facts.st_mtime < MAKING_S
            raise StoreError(f"store {self.file} {_told(error, is_new=is_new)}") from error
        except sqlite3.DatabaseError as error:
            raise StoreError(
                f"store {self.file} is damaged ({error}); move it away: `spiketrain sync RUN` fills"
                " a new one from the journals"
            ) from error

    def _facts(self) -> os.stat_result:
        try:
            facts = self.file.stat()
        except (FileNotFoundError, NotADirectoryError):
            facts = None
        except OSError as error:
            raise StoreError(
                f"store {self.file} cannot be read ({error.strerror}); {_READABLE}"
            ) from error
        if facts is None or not stat.S_ISREG(facts.st_mode):
            raise StoreError(
                f"store {self.file} does not exist; launch a run, or name another by"
                " MLFLOW_TRACKING_URI"
            )
        return facts

    def _opened(self) -> sqlite3.Connection:
        """Read-only, unless its last writer was killed in the middle of a write, which SQLite
        itself must undo first.
        """
        connection = self._open("ro")
        try:
            connection.execute("select 1 from alembic_version").fetchall()
        except sqlite3.OperationalError as error:
            connection.close()
            if error.sqlite_errorcode not in (
                sqlite3.SQLITE_READONLY_ROLLBACK,
                sqlite3.SQLITE_CANTOPEN,
            ):
                raise
            connection = self._open("rw")
        except sqlite3.DatabaseError:
            connection.close()
            raise
        return connection

    def _open(self, mode: str) -> sqlite3.Connection:
        return sqlite3.connect(
            f"file:{quote(str(self.file))}?mode={mode}", uri=True, timeout=LOCKED_S
        )


def _told(error: sqlite3.OperationalError, *, is_new: bool) -> str:
    text = str(error)
    if "locked" in text or "busy" in text:
        return (
            f"is locked by another process for over {LOCKED_S:g} s; try again, or end who holds it"
        )
    again = f"look again in {MAKING_S:g} s"
    if "no such table: alembic_version" in text and is_new:
        return f"is being made, or is no MLflow store; {again}"
    if "no such table: alembic_version" in text:
        return (
            "is no MLflow store; name another, or move it away: `spiketrain sync RUN` fills a"
            " new one"
        )
    if "no such table" in text or "no such column" in text:
        making, waits = ("is being made, or ", f"{again}, then ") if is_new else ("", "")
        return (
            f"{making}is of another version of MLflow ({text}); {waits}mlflow db upgrade"
            " sqlite:///FILE"
        )
    return f"cannot be read ({text}); {_READABLE}"


def _runs(
    rows: list[tuple], newest: dict[str, int], metrics: dict[str, dict[str, float]]
) -> list[StoredRun]:
    """One from all rows of a run: a row for each tag."""
    tags: dict[str, dict[str, str]] = {}
    heads: dict[str, tuple[Any, ...]] = {}
    for run, *head, key, value in rows:
        tags.setdefault(run, {})[key] = value
        heads[run] = tuple(head)
    return [
        StoredRun(
            id=run,
            name=name or run,
            experiment=experiment,
            state=state,
            started=(started or 0) / 1000,
            newest=max(ended or 0, newest.get(run, 0)) / 1000,
            tags=tags[run],
            metrics=metrics.get(run, {}),
            parent=tags[run].get(PARENT_OF),
            **{name: tags[run].get(f"spiketrain.{name}", "") for name in ("study", "rule", "seed")},
        )
        for run, (name, experiment, state, started, ended) in heads.items()
    ]
