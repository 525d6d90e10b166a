"""Where the checkpoints of a run are kept, and what is asked of any such place: the newest, the best, no more than are wanted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pipeline.checkpoint.sealed import damage
from pipeline.pickles import code_in
from pipeline.refused import Refused

TRAINER = "trainer.json"
WRITING = ".writing-"
"""and its attempt's name and its own, are the folder in which a checkpoint is written"""


class CheckpointError(Refused):
    """A checkpoint that cannot be used, in one line."""


class Place(Protocol):
    """Of one run. A checkpoint is there under its name, whole, or it is not."""

    @property
    def staging(self) -> Path:
        """A folder that every rank sees, in which a checkpoint's files are written before they are put in their place."""
        ...

    def names(self) -> list[str]:
        """Of the checkpoints, oldest first; whether they are still as they were written is `damage`'s to say."""
        ...

    def address(self, name: str) -> str:
        """Where a person finds it."""
        ...

    def put(self, temp: Path, name: str, files: Iterable[str]) -> None:
        """Bring what one rank has written in `temp` to where it belongs; each rank calls it with its own files."""
        ...

    def finish(self, temp: Path, name: str) -> str:
        """All files are there and `temp` holds the manifest: make them a checkpoint, which counts in the place of its namesake.

        Its address. Whenever we die in the middle of this, the one or the other is whole, and found after a `sweep`.
        """
        ...

    def tidy(self, name: str) -> None:
        """Delete what the checkpoint of this name has replaced."""
        ...

    def fetch(self, name: str) -> Path:
        """A folder that holds it, whole or not, until this process fetches the next one or ends; every rank sees it."""
        ...

    def trainer(self, name: str) -> dict[str, Any]:
        """Its `trainer.json`, unverified. Raises ValueError where that is damaged, FileNotFoundError where it is missing."""
        ...

    def delete(self, name: str) -> None:
        """No part of it may ever look like a whole one, also when we die in the middle of this."""
        ...

    def set_aside(self, name: str, aside: str) -> None:
        """Move a damaged one out of the way, to the path `aside` in this place."""
        ...

    def read(self, file: str) -> bytes:
        """A file beside the checkpoints. Raises FileNotFoundError where there is none."""
        ...

    def write(self, file: str, content: bytes) -> None:
        """A file beside the checkpoints: whoever reads it meanwhile has the one before, or this one."""
        ...

    def is_pinned(self, name: str) -> bool:
        """Whether somebody outside of the run knows it by its address. Raises OSError where that cannot be told."""
        ...

    def sweep(self) -> None:
        """Delete what writers left behind that died; what they had set aside comes back where nothing is in its place.

        What cannot be deleted stays, and counts for nothing.

        For whoever holds the run's lock (pipeline/run/writer.py), and owns the place (owner.py).
        """
        ...


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """The step of a checkpoint by its name."""
    return int(name.removeprefix("step_"))


def newest(place: Place, *, suffix: str, on_quarantine: Callable[[str, str], None]) -> Path | None:
    """The newest checkpoint that verifies, on this machine; damaged ones are moved away and told (address, reason).

    Raises:
        CheckpointError: it verifies, and one of its files would run code: somebody has put it there.
    """
    place.sweep()
    for name in reversed(place.names()):
        path = place.fetch(name)
        reason = damage(path)
        if reason is None:
            if said := code_in(path):
                raise CheckpointError(f"checkpoint {path}: must hold data alone; {said}; move it away if it is not yours")
            return path
        quarantine(place, name, reason, suffix=suffix, on_quarantine=on_quarantine)
    return None


def quarantine(place: Place, name: str, reason: str, *, suffix: str, on_quarantine: Callable[[str, str], None]) -> None:
    """Move a checkpoint that nobody may go on from out of the way."""
    aside = f"quarantine/{PurePosixPath(place.address(name)).name}-{suffix}"
    # Before it is moved: one that was moved and never told would be missed for ever, as the journal says that it was saved.
    on_quarantine(place.address(aside), reason)
    place.set_aside(name, aside)


def verified(place: Place, which: str = "last") -> Path:
    """The newest checkpoint that verifies, or the one with the best score, on this machine.

    Raises:
        CheckpointError: there is none.
        OSError: one cannot be looked at, and may be the one: its storage is away, or lets nobody read it.
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
    """Of `saved` and what is older delete all but the newest `keep`, the one with the best score, and what is pinned.

    One that is newer is not this attempt's, and may be hollow: its manifest was under way when the place was taken over.

    Raises:
        OSError: the score of one cannot be read now, and may be the best: it stays, beside the best of the others.
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
        if name != best and name not in unread and not place.is_pinned(name):
            place.delete(name)
    if unread:
        raise next(iter(unread.values()))


def _score(place: Place, name: str) -> float | None:
    """None, too, for a damaged checkpoint: it is nobody's best.

    Raises:
        OSError: it cannot be looked at, and may be whole.
    """
    try:
        return place.trainer(name)["score"]
    except (FileNotFoundError, ValueError, KeyError):
        return None


def read_trainer(path: Path) -> dict[str, Any]:
    return told_by((path / TRAINER).read_bytes())


def told_by(trainer: bytes) -> dict[str, Any]:
    """What a `trainer.json` says.

    Raises:
        ValueError: it is damaged.
    """
    told = json.loads(trainer)
    if not isinstance(told, dict):
        raise ValueError(f"{TRAINER} must hold an object; got {told!r}")
    return told
