"""The journal of a run: append-only JSON lines, from which MLflow, the progress bar and reports get
their data.

One event is one line, `{"event": kind, "time": Unix seconds, "attempt": n, ...fields}`. A process
may be killed while it writes a line. So readers skip incomplete lines, and a new attempt begins on
a new line.
"""

import errno
import json
import mmap
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from pipeline.core.files import sync_folder
from pipeline.track.events import KIND, Event, from_dict

Record = dict[str, Any]  # an event in its JSON form
E_ = TypeVar("E_", bound=Event)


class NullTracker:
    """The tracker of ranks other than 0, which ignores events."""

    def write(self, event: Event, /) -> None:
        del event


class Journal:
    """Appends events to the journal at `path`, whose folder must exist.

    `attempt` is the number of the attempt, from 0, or NO_ATTEMPT. Each event is one `write` with
    O_APPEND, so the lines of two writers on one host cannot mix.
    """

    def __init__(self, path: str | os.PathLike[str], *, attempt: int) -> None:
        self.path = Path(path)
        self.attempt = attempt
        is_new = not self.path.exists()
        self._file = self.path.open("ab+", buffering=0)
        if is_new:
            sync_folder(self.path.parent)
        size = os.fstat(self._file.fileno()).st_size
        self._is_torn = size > 0 and os.pread(self._file.fileno(), 1, size - 1) != b"\n"

    def write(self, event: Event, /) -> None:
        """Set the time and the attempt of an event, and append the event.

        As in Python's JSON, not-a-number is `NaN`, and infinities are `Infinity` and `-Infinity`.

        Raises:
            ValueError: the journal is closed.
            TypeError: a field has no JSON form.
            OSError: the line was not written or not flushed, or only a part of it was written.
                Readers skip the part, and the next event begins on a new line.
        """
        event = replace(event, time=time.time(), attempt=self.attempt)
        line = json.dumps(event.to_dict(), default=_converted)
        data = b"\n" * self._is_torn + line.encode() + b"\n"
        descriptor = self._file.fileno()
        try:
            written = os.write(descriptor, data)
        except OSError as error:
            raise OSError(error.errno, f"journal: {error.strerror}", str(self.path)) from error
        self._is_torn = written < len(data)
        if self._is_torn:
            raise OSError(
                errno.ENOSPC,
                f"journal: only {written} of {len(data)} bytes were written",
                str(self.path),
            )
        if event.durable:
            os.fsync(descriptor)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


Tracker = Journal | NullTracker  # rank 0 holds a `Journal`, the others a `NullTracker`


def read(path: str | os.PathLike[str], *kinds: str) -> list[Record]:
    """The events of these kinds in a journal, or all events if no kind is given, oldest first.
    Empty if there is no journal yet. Lines that are incomplete or of other kinds are not parsed.
    """
    return list(_parsed(_lines(path, *kinds)))


def read_events(path: str | os.PathLike[str]) -> list[Event]:
    """As `read`, but the events are instances of their classes.

    Raises:
        ValueError: a kind is unknown, or the fields of an event are not those of its kind. The
            message is one line.
    """
    try:
        return [from_dict(event) for event in read(path)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def first(path: str | os.PathLike[str], *kinds: str) -> Record | None:
    """The oldest event of one of these kinds; None if there is none. The lines of other kinds are
    not parsed.
    """
    return next(_parsed(_lines(path, *kinds)), None)


def read_thinned(path: str | os.PathLike[str], kind: str, *, every: int) -> list[Record]:
    """The events in a journal, oldest first. Of the events of `kind`, only every `every`-th is
    kept. Skipped lines are not parsed.

    The last event of `kind` before an event of another kind, or before the end, is also kept, so
    that curves keep their last point.
    """
    head, lines, count, skipped = _head(kind), list[bytes](), 0, b""
    for line in _lines(path):
        is_thinned = line.startswith(head)
        count += is_thinned
        if is_thinned and count % every:
            skipped = line
            continue
        lines += [line] if is_thinned else [skipped, line]
        skipped = b""
    return list(_parsed([*lines, skipped]))


def last(path: str | os.PathLike[str], *kinds: str) -> Record | None:
    """The newest event of one of these kinds; None if there is none. The search begins at the end
    of the file.
    """
    try:
        with Path(path).open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:  # mmap cannot map an empty file
                return None
            text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        return None
    heads, end = [_head(kind) for kind in kinds], len(text)
    with text:
        while True:
            start = -1
            for head in heads:  # only lines after the newest one so far are searched
                start = max(start, text.rfind(head, max(start, 0), end))
            if start < 0:
                return None
            line = text[start : text.find(b"\n", start) + 1]
            if (event := next(_parsed([line]), None)) is not None:
                return event
            end = start  # this line is incomplete


def last_event(path: str | os.PathLike[str], *kinds: type[E_]) -> E_ | None:
    """As `last`, but the event is an instance of one of these classes.

    Raises:
        ValueError: the fields of the event are not those of its kind. The message is one line.
    """
    newest = last(path, *(kind.kind for kind in kinds))
    return None if newest is None else cast("E_", from_dict(newest))


@dataclass
class Follower:
    """Reads a growing journal. `poll` returns the events that were completed since the last poll.

    `offset` is the byte position of the next poll. If it is inside a line, the rest of that line is
    skipped. After a poll that returned events, `offset` is at the start of a line.
    """

    path: Path
    offset: int = 0

    def poll(self, *, limit_bytes: int | None = None) -> list[Record]:
        """The new events, oldest first.

        The result is empty if there is no journal. A journal that is shorter than `offset` is a new
        file, and is read from its start.

        Args:
            limit_bytes: the number of bytes to read, extended to the end of a line; None: all.
        """
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self.offset:
                    self.offset = 0
                file.seek(self.offset)
                block = file.read(limit_bytes) + file.readline()
        except FileNotFoundError:
            return []
        lines = block[: block.rfind(b"\n") + 1]
        self.offset += len(lines)
        return list(_parsed(lines.splitlines(keepends=True)))


def number(value: Any) -> float | None:
    """A JSON value as a float; None if it is not a number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else None


def _lines(path: str | os.PathLike[str], *kinds: str) -> Iterator[bytes]:
    """The complete lines of these kinds in a journal, or all complete lines if no kind is given."""
    heads = tuple(map(_head, kinds)) or b""
    try:
        with Path(path).open("rb") as file:
            yield from (line for line in file if line.endswith(b"}\n") and line.startswith(heads))
    except FileNotFoundError:
        return


def _head(kind: str) -> bytes:
    # The first bytes of each line of this kind.
    return f'{{"{KIND}": {json.dumps(kind)},'.encode()


def _parsed(lines: Iterable[bytes]) -> Iterator[Record]:
    """The events of the complete lines. A part of a line is not a JSON object."""
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # includes JSONDecodeError and UnicodeDecodeError
            continue
        if isinstance(event, dict) and isinstance(event.get(KIND), str):
            yield event


def _converted(value: Any) -> Any:
    """The JSON form of a path, or of a scalar or array of numpy or torch."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(getattr(value, "tolist", None)):
        return value.tolist()
    raise TypeError(f"journal: a field must have a JSON form; got {type(value).__name__} {value!r}")
