"""The place of a run's checkpoints: what every kind of place can do, and what is asked of any.

`Folder` and `Store` implement `Place`; `Owned` guards one of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pipeline.core.errors import UserError
from pipeline.core.files import Unreadable
from pipeline.core.tensor_file import find_code
from pipeline.track.events import Checkpoint, Event, Quarantine, Start
from pipeline.train.checkpoint.manifest import damage

TRAINER = "trainer.json"
WRITING = ".writing-"
"""begins the name of the folder in which an attempt writes a checkpoint"""


class CheckpointError(UserError):
    """A checkpoint that cannot be used, in one line."""


class Place(Protocol):
    """The checkpoints of one run. A checkpoint is whole under its name, or it is absent."""

    @property
    def staging(self) -> Path:
        """A folder that every rank sees, in which the files of a checkpoint are written first."""
        ...

    def names(self) -> list[str]:
        """The checkpoints, oldest first; `damage` says whether their bytes are intact."""
        ...

    def address(self, name: str) -> str:
        """The path or URI of a checkpoint or file, for people."""
        ...

    def finish(self, temp: Path, name: str) -> str:
        """Make the sealed folder `temp` the checkpoint `name`; its address. It replaces an older
        one.

        A process that dies at any point leaves the older one or the new one, found after a `sweep`.
        """
        ...

    def tidy(self, name: str) -> None:
        """Delete what the checkpoint `name` has replaced."""

    def fetch(self, name: str) -> Path:
        """A folder with the checkpoint, intact or not, that every rank sees.

        It stays until this process fetches the next one or ends.
        """
        ...

    def read(self, file: str) -> bytes:
        """A file beside the checkpoints, or NAME/FILE of a checkpoint, unverified.

        Raises:
            FileNotFoundError: there is none.
            Unreadable: its medium fails.
        """
        ...

    def write(self, file: str, content: bytes) -> None:
        """Replace a file beside the checkpoints; readers see the older content or the new."""

    def delete(self, name: str) -> None:
        """Delete a checkpoint. A process that dies in between leaves nothing that looks whole."""

    def set_aside(self, name: str, aside: str) -> None:
        """Move a checkpoint to the path `aside` in this place."""

    def sweep(self) -> None:
        """Delete what dead writers left; a replaced checkpoint without its successor comes back.

        Only for the holder of the run's lock (pipeline/train/writer_lock.py) and owner of the
        place.
        """


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """The step of a checkpoint by its name."""
    return int(name.removeprefix("step_"))


def newest(place: Place, *, suffix: str, on_quarantine: Callable[[str, str], None]) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are quarantined, see `quarantine`.

    Raises:
        CheckpointError: it verifies, and one of its files would run code when it is loaded.
    """
    place.sweep()
    for name in reversed(place.names()):
        path = place.fetch(name)
        reason = damage(path)
        if reason is None:
            if said := find_code(path):
                raise CheckpointError(
                    f"checkpoint {path}: must hold data alone; {said}; move it away if it is not"
                    " yours"
                )
            return path
        quarantine(place, name, reason, suffix=suffix, on_quarantine=on_quarantine)
    return None


def quarantine(
    place: Place, name: str, reason: str, *, suffix: str, on_quarantine: Callable[[str, str], None]
) -> None:
    """Report a checkpoint by its new address and the reason, then move it there.

    In this order: the journal says that it was saved, and would miss it for ever.
    """
    aside = f"quarantine/{PurePosixPath(place.address(name)).name}-{suffix}"
    on_quarantine(place.address(aside), reason)
    place.set_aside(name, aside)


def verified(place: Place, which: str = "last") -> Path:
    """The newest checkpoint that verifies, or with "best" the one with the best score.

    Raises:
        CheckpointError: there is none.
        OSError: one cannot be looked at now, and may be the one.
    """
    names = place.names()
    if which == "best":
        scores = {name: score for name in names if (score := _score(place, name)) is not None}
        names = sorted(scores, key=lambda name: (scores[name], name))
    for name in reversed(names):
        path = place.fetch(name)
        if damage(path) is None:
            return path
    kind = "with a score that verifies" if which == "best" else "that verifies"
    raise CheckpointError(f"{place.address('')}: needs a checkpoint {kind}; got none")


def prune(place: Place, saved: str, *, keep: int) -> None:
    """Delete old checkpoints, except the newest `keep`, the best by score and the pinned ones.

    Checkpoints newer than `saved` belong to another attempt: they stay and do not count.

    Raises:
        OSError: the score of one cannot be read now. It stays, as it may be the best.
    """
    names = [name for name in place.names() if name <= saved]
    if len(names) <= keep:
        return
    scores: dict[str, float] = {}
    unread: dict[str, OSError] = {}
    for name in names:
        try:
            if (score := _score(place, name)) is not None:
                scores[name] = score
        except OSError as error:
            unread[name] = error
    best = max(scores, key=lambda name: (scores[name], name), default=None)
    for name in names[:-keep]:
        if name != best and name not in unread and not _is_pinned(place, name):
            place.delete(name)
    for error in unread.values():
        raise error


def _is_pinned(place: Place, name: str) -> bool:
    try:
        place.read(f"{name}.pinned")
    except FileNotFoundError:
        return False
    return True


def _score(place: Place, name: str) -> float | None:
    """The score of a checkpoint; None where it has none or is damaged.

    Raises:
        OSError: it cannot be looked at, and may be whole.
    """
    try:
        return trainer_of(place, name)["score"]
    except (FileNotFoundError, ValueError, KeyError):
        return None


def trainer_of(place: Place, name: str) -> dict[str, Any]:
    """The content of a checkpoint's trainer.json, unverified.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged.
        OSError: it cannot be looked at, and may be whole.
    """
    try:
        return _parsed(place.read(f"{name}/{TRAINER}"))
    except Unreadable as error:
        where = place.address(name)
        raise ValueError(f"{where}/{TRAINER} cannot be read: {error.strerror}") from error


def read_trainer(path: Path) -> dict[str, Any]:
    """The content of trainer.json in a checkpoint's folder.

    Raises:
        ValueError: it is damaged.
    """
    return _parsed((path / TRAINER).read_bytes())


def _parsed(trainer: bytes) -> dict[str, Any]:
    value = json.loads(trainer)
    if not isinstance(value, dict):
        raise ValueError(f"{TRAINER} must hold an object; got {value!r}")
    return value


def lost_step(events: Iterable[Event], *, keep: int) -> int | None:
    """The step of the newest checkpoint that must exist by the journal's events; None: none must.

    Each start names the newest one at that time. Of those saved since, the newest `keep` exist,
    except those in quarantine.
    """
    there: set[int] = set()
    for event in events:
        if isinstance(event, Start):
            there = {step for step in {*there, event.step} if 0 < step <= event.step}
        elif isinstance(event, Checkpoint):
            there = set(sorted({*there, event.step})[-keep:])
        elif isinstance(event, Quarantine):
            if name := re.match(r"step_(\d+)", PurePosixPath(event.path).name):
                # The event of its saving may be missing, and it has replaced an older one.
                there = set(sorted({*there, int(name[1])})[-keep:]) - {int(name[1])}
    return max(there, default=None)
