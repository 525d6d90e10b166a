"""The owner of a place of checkpoints outside of its run's folder, where that folder's lock ends.

A driver writes `owner.json` into the place, with a token of its own, before it changes anything
there. Every change checks the token first. So of two drivers the later one has the place, and the
earlier one ends at its next save, wherever it runs.
"""

from __future__ import annotations

import json
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.recipe.spec import arguments_of
from pipeline.train.checkpoint.folder import Folder
from pipeline.train.checkpoint.place import CheckpointError, Place, trainer_of
from pipeline.train.checkpoint.store import Store

FILE = "owner.json"


@dataclass(frozen=True)
class Owner:
    """A run, and the driver that trains it."""

    run_id: str
    study: str
    run: str
    """its folder"""
    token: str = ""
    """of one start of a driver; empty: known from a checkpoint, no driver has claimed the place"""
    host: str = ""
    since: str = ""

    def __str__(self) -> str:
        driver = f", driven on {self.host} since {self.since}" if self.token else ""
        return f"run {self.run_id[:8]} ({self.run}{driver})"


def owner_of(place: Place) -> Owner | None:
    """The owner by owner.json, else by the newest intact trainer.json; None: nobody has the place.

    Raises:
        CheckpointError: owner.json is damaged.
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


def _saved_by(place: Place) -> Owner | None:
    for name in reversed(place.names()):
        try:
            trainer = trainer_of(place, name)
        except (FileNotFoundError, ValueError):
            continue
        return Owner(*(str(trainer.get(key, "unknown")) for key in ("run_id", "study", "run")))
    return None


def claim(place: Place, *, run: str, run_id: str, study: str) -> str:
    """Write a run down as the owner of a place that is free or its own; the token of its workers.

    Raises:
        CheckpointError: another run owns it, or owner.json is damaged. Nothing was changed.
        OSError: the place cannot be looked at, or written to.
    """
    owner = owner_of(place)
    if owner is not None and owner.run_id != run_id:
        raise CheckpointError(
            f"checkpoints: {place.address('')} must be of run {run_id[:8]} ({run}); got those of"
            f" {owner}"
        )
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    new = Owner(run_id, study, run, uuid.uuid4().hex, socket.gethostname(), since)
    place.write(FILE, json.dumps(asdict(new), indent=1).encode())
    return new.token


class Owned:
    """`place`, whose changes raise CheckpointError once `token` is no longer its owner's."""

    def __init__(self, place: Folder | Store, token: str) -> None:
        self.place, self.token, self.staging = place, token, place.staging
        self.names, self.address = place.names, place.address
        self.fetch, self.read = place.fetch, place.read
        self.write, self.tidy = self._checked(place.write), self._checked(place.tidy)
        self.delete, self.set_aside = self._checked(place.delete), self._checked(place.set_aside)
        self.sweep = self._checked(place.sweep)

    def finish(self, temp: Path, name: str) -> str:
        self._check()
        address = self.place.finish(temp, name, self._check)
        self._check()  # a driver that took over before the last step has swept the parts
        return address

    def _checked(self, change: Callable[..., None]) -> Callable[..., None]:
        def checked(*args: Any) -> None:
            self._check()
            change(*args)

        return checked

    def _check(self) -> None:
        owner = owner_of(self.place)
        if owner is None or owner.token != self.token:
            got = "none" if owner is None else owner
            raise CheckpointError(
                f"checkpoints: the owner of {self.address('')} must be this driver; got {got}: it"
                " writes nothing more there"
            )
