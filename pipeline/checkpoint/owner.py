"""Whose a place of checkpoints is that lies outside of its run's folder, where that folder's locks do not reach.

`owner.json` in the place says so: a driver writes it, with a token of its own, before anything there is deleted, moved or
written. Whoever changes something asks for the token first: of two drivers the later has the place, and the earlier, wherever it
runs, ends at its next save.
"""

from __future__ import annotations

import json
import socket
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.checkpoint.place import CheckpointError, Place
from pipeline.spec import arguments_of

FILE = "owner.json"


@dataclass(frozen=True)
class Owner:
    """A run, and the driver that trains it."""

    run_id: str
    study: str
    run: str
    """its folder"""
    token: str = ""
    """of one start of a driver; "": no driver wrote itself down, a checkpoint says whose it is"""
    host: str = ""
    since: str = ""

    def __str__(self) -> str:
        driver = f", driven on {self.host} since {self.since}" if self.token else ""
        return f"run {self.run_id[:8]} ({self.run}{driver})"


def owner_of(place: Place) -> Owner | None:
    """Who wrote itself down there, else the run that saved the newest checkpoint which tells; None: nobody has it.

    Raises:
        CheckpointError: its owner.json is damaged.
        OSError: the place cannot be looked at.
    """
    try:
        content = place.read(FILE)
    except FileNotFoundError:
        return _saved_by(place)
    try:
        return Owner(**arguments_of(Owner, json.loads(content), who=FILE))
    except ValueError as error:
        said = f"checkpoints: {place.address(FILE)} must say whose they are; it is damaged: {error}"
        raise CheckpointError(f"{said}; move it away if nobody trains there") from error


def claim(place: Place, *, run: str, run_id: str, study: str) -> str:
    """Write a run down as the owner of a place that is its own or nobody's; the token by which its workers write there.

    Raises:
        CheckpointError: it is another run's, or its owner.json is damaged. Nothing has been touched.
        OSError: the place cannot be looked at, or written to.
    """
    owner = owner_of(place)
    if owner is not None and owner.run_id != run_id:
        raise CheckpointError(f"checkpoints: {place.address('')} must be of run {run_id[:8]} ({run}); got those of {owner}")
    new = Owner(run_id, study, run, uuid.uuid4().hex, socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S %Z"))
    place.write(FILE, json.dumps(asdict(new), indent=1).encode())
    return new.token


def _saved_by(place: Place) -> Owner | None:
    for name in reversed(place.names()):
        try:
            trainer = place.trainer(name)
        except (FileNotFoundError, ValueError):
            continue  # damaged: moved away by whoever trains
        return Owner(*(str(trainer.get(key, "unknown")) for key in ("run_id", "study", "run")))
    return None


class Owned:
    """`place`, which is changed only while `token` is its owner's.

    Whatever changes it raises CheckpointError once another driver has taken it over.
    """

    def __init__(self, place: Place, token: str) -> None:
        self.place, self.token = place, token
        self.staging = place.staging
        self.names, self.address, self.fetch, self.trainer = place.names, place.address, place.fetch, place.trainer
        self.is_pinned, self.read = place.is_pinned, place.read

    def put(self, temp: Path, name: str, files: Iterable[str]) -> None:
        self._check()
        self.place.put(temp, name, files)

    def finish(self, temp: Path, name: str) -> str:
        self._check()
        address = self.place.finish(temp, name)
        self._check()  # who took it over before it was whole has swept its parts
        return address

    def tidy(self, name: str) -> None:
        self._check()
        self.place.tidy(name)

    def delete(self, name: str) -> None:
        self._check()
        self.place.delete(name)

    def set_aside(self, name: str, aside: str) -> None:
        self._check()
        self.place.set_aside(name, aside)

    def sweep(self) -> None:
        self._check()
        self.place.sweep()

    def write(self, file: str, content: bytes) -> None:
        self._check()
        self.place.write(file, content)

    def _check(self) -> None:
        owner = owner_of(self.place)
        if owner is None or owner.token != self.token:
            got = "none" if owner is None else owner
            raise CheckpointError(
                f"checkpoints: the owner of {self.address('')} must be this driver; got {got}: it writes nothing more there"
            )
