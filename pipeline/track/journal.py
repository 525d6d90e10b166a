"""The journal of a run: append-only JSON lines, the source of MLflow, progress bar and reports.

One event is one line, `{"event": kind, "time": unix seconds, "attempt": n, ...fields}`. A process
may be killed at any byte: readers skip what is not a whole line, and a new attempt begins on a
fresh one.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from pipeline.core.files import sync_folder
from pipeline.track.events import KIND, OF_NONE, Event, from_dict

__all__ = [
    "OF_NONE",
    "Follower",
    "Journal",
    "NullTracker",
    "Record",
    "Tracker",
    "every",
    "first",
    "last",
    "last_event",
    "number",
    "read",
    "read_events",
    "read_thinned",
]

Record = dict[str, Any]
"""an event in its JSON form"""
E_ = TypeVar("E_", bound=Event)
_RESERVED = (KIND, *(field.name for field in fields(Event)))


class Tracker(Protocol):
    """Takes the events of one run. Rank 0 holds a `Journal`, the others a `NullTracker`."""

    def write(self, event: Event, /) -> None:
        """Take one event. It survives a power cut if its class is `durable`."""
        ...


class NullTracker:
    """The tracker of ranks other than 0, which ignores events."""

    def write(self, event: Event, /) -> None:
        del event


class Journal:
    """Appends events to the journal at `path`, whose folder must exist.

    `attempt` counts the starts of the run from 0, or is OF_NONE. Each event is one `write` with
    O_APPEND, so lines of two writers on one host cannot mix.
    """

    def __init__(self, path: str | os.PathLike[str], *, attempt: int) -> None:
        self.path = Path(path)
        self.attempt = attempt
        fresh = not self.path.exists()
        self._fd: int | None = os.open(
            self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644
        )
        if fresh:
            sync_folder(self.path.parent)
        size = os.fstat(self._fd).st_size
        self._torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"

    def write(self, event: Event, /) -> None:
        """Append one event, with the time and the attempt set.

        NaN and infinities become "nan", "inf" and "-inf", which `from_dict` reads back.

        Raises:
            ValueError: the journal is closed.
            TypeError: a field has no JSON form.
            OSError: the disk refused (part of) the line. Readers skip it; the next event begins
                on a new line.
        """
        event = replace(event, time=time.time(), attempt=self.attempt)
        self._append(event.to_dict(), sync=event.durable)

    def event(self, kind: str, /, *, sync: bool = False, **values: Any) -> None:
        """Append an event by its JSON form; see `write`."""
        for name in _RESERVED:
            if name in values:
                raise ValueError(
                    f"journal: the field {name!r} is the journal's own; got it in event {kind!r}"
                )
        line = {KIND: kind, "time": time.time(), "attempt": self.attempt, **values}
        self._append(line, sync=sync)

    def _append(self, line: Record, *, sync: bool) -> None:
        if self._fd is None:
            raise ValueError(f"journal {self.path} is closed; got event {line[KIND]!r}")
        data = json.dumps(_plain(line), allow_nan=False, default=_converted).encode() + b"\n"
        if self._torn:
            data = b"\n" + data
        try:
            written = os.write(self._fd, data)
        except OSError as error:
            raise OSError(error.errno, f"journal: {error.strerror}", str(self.path)) from error
        self._torn = written < len(data)
        if self._torn:
            raise OSError(
                errno.ENOSPC,
                f"journal: only {written} of {len(data)} bytes were written",
                str(self.path),
            )
        if sync:
            os.fsync(self._fd)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read(path: str | os.PathLike[str]) -> list[Record]:
    """All whole events of a journal, in order; empty when there is no journal yet."""
    return Follower(path).poll()


def read_events(path: str | os.PathLike[str]) -> list[Event]:
    """As `read`, but typed.

    Raises:
        ValueError: the fields of an event are not those of its kind; one line.
    """
    return [from_dict(event) for event in read(path)]


def last_event(path: str | os.PathLike[str], *kinds: type[E_]) -> E_ | None:
    """The newest event of these classes; see `last`.

    Raises:
        ValueError: its fields are not those of its kind; one line.
    """
    found = last(path, *(kind.kind for kind in kinds))
    return None if found is None else cast("E_", from_dict(found))


def read_thinned(path: str | os.PathLike[str], kind: str, *, every: int) -> list[Record]:
    """As `read`, but only every `every`-th event of one kind; the other lines are not parsed.

    The last event of that kind before one of another kind is kept too, so that curves end where
    they ended.
    """
    head, kept, count, skipped = _head(kind), [], 0, b""
    try:
        with Path(path).open("rb") as file:
            for line in file:
                if not line.endswith(b"}\n"):
                    continue  # the remains of a killed writer
                if line.startswith(head):
                    count += 1
                    if count % every:
                        skipped = line
                        continue
                elif skipped:
                    kept.append(skipped)
                kept.append(line)
                skipped = b""
    except FileNotFoundError:
        return []
    return [event for line in (*kept, skipped) if (event := _parse(line)) is not None]


class Follower:
    """Reads a growing journal: `poll` returns the events completed since the last one.

    `offset` is a byte position. A line that began before it is skipped. After a poll that returned
    events, the attribute `offset` is the start of a line.
    """

    def __init__(self, path: str | os.PathLike[str], *, offset: int = 0) -> None:
        self.path = Path(path)
        self.offset = offset

    def poll(self, *, limit_bytes: int | None = None) -> list[Record]:
        """New events, oldest first, from about `limit_bytes` of the file at most.

        A journal that does not exist has no events. A journal that is shorter than `offset` is a
        new file, and is read from its start.
        """
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < self.offset:
                    self.offset = 0
                file.seek(self.offset)
                block = (
                    file.read() if limit_bytes is None else file.read(limit_bytes) + file.readline()
                )
        except FileNotFoundError:
            return []
        whole = block[: block.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [event for line in whole.split(b"\n") if (event := _parse(line)) is not None]


def number(value: Any) -> float | None:
    """The number that a JSON value stands for ("nan", "inf" and "-inf" among them), or None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    return float(value) if value in ("nan", "inf", "-inf") else None


def first(path: str | os.PathLike[str], *kinds: str) -> Record | None:
    """The first event of one of these kinds; the lines of other kinds are not parsed."""
    heads = tuple(_head(kind) for kind in kinds)
    try:
        with Path(path).open("rb") as file:
            for line in file:
                if line.startswith(heads) and line.endswith(b"\n") and (event := _parse(line)):
                    return event
    except FileNotFoundError:
        pass
    return None


def every(path: str | os.PathLike[str], kind: str) -> list[Record]:
    """All events of one kind, oldest first; the lines of other kinds are not parsed."""
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    head = _head(kind)
    lines = [head + rest.partition(b"\n")[0] for rest in text.split(head)[1:]]
    return [event for line in lines if (event := _parse(line)) is not None]


def last(path: str | os.PathLike[str], *kinds: str) -> Record | None:
    """The newest event of one of these kinds. The search begins at the end of the file."""
    begin, found = 0, None
    try:
        with Path(path).open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:  # mmap refuses an empty file
                return None
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                for kind in kinds:
                    at, event = _newest(text, kind, begin)
                    if event is not None:  # of the other kinds only a newer one counts
                        begin, found = at, event
    except FileNotFoundError:
        pass
    return found


def _newest(text: mmap.mmap, kind: str, begin: int) -> tuple[int, Record | None]:
    """The newest whole event of a kind from byte `begin` on, and where it begins."""
    at = text.rfind(_head(kind), begin)
    while at >= 0:
        end = text.find(b"\n", at)
        if end >= 0 and (event := _parse(text[at:end])):
            return at, event
        at = text.rfind(_head(kind), begin, at)
    return at, None


def _head(kind: str) -> bytes:
    """The beginning of a line of this kind: the kind is written first."""
    return f'{{"{KIND}": {json.dumps(kind)},'.encode()


def _parse(line: bytes) -> Record | None:
    """The event of a line; None for an empty line and for a part of one.

    A part without the beginning is never JSON: it closes a brace that it does not open.
    """
    if not line:
        return None
    try:
        event = json.loads(line)
    except ValueError:  # covers JSONDecodeError and UnicodeDecodeError
        return None
    return event if isinstance(event, dict) and isinstance(event.get(KIND), str) else None


def _plain(value: Any) -> Any:
    """A value whose floats have a JSON form: those that are not finite as strings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _converted(value: Any) -> Any:
    """The JSON form of a path, or of a scalar or array of numpy or torch."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(getattr(value, "tolist", None)):
        return _plain(value.tolist())
    raise TypeError(f"journal: no JSON form for a {type(value).__name__}: {value!r}")
