"""Saving and restoring: training waits for a copy of its state, and a thread writes it; one checkpoint at a time."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.backend.base import Backend
from pipeline.backend.copied import copied
from pipeline.checkpoint import background
from pipeline.checkpoint.background import Background
from pipeline.checkpoint.place import (
    TRAINER,
    CheckpointError,
    Place,
    newest,
    prune,
    quarantine,
    read_trainer,
    step_name,
    step_of,
)
from pipeline.checkpoint.random_state import rng_state, set_rng_state
from pipeline.checkpoint.sealed import MANIFEST, read_manifest
from pipeline.disk import FOR_THE_USER
from pipeline.refused import Refused
from pipeline.units import counted

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole."""

    address: str
    step: int
    write_s: float
    """from when its state was copied until it was whole"""
    bytes: int
    untidy: str = ""
    """why an older one, which should go, could not be deleted"""


class Checkpoints:
    """The checkpoints of one run, written by all of its ranks together.

    Args:
        place: where they are kept.
        attempt: names this process group's temp folders, so that workers of an abandoned attempt never meet ours.
        keep: newest checkpoints that survive pruning; the one with the best score, and what is pinned, survive beside them.
        ranks: how many there are.
        each: every rank's value, in the order of ranks, on every rank; see `Ranks.each`.
        on_quarantine: told (address, reason) of each damaged checkpoint, before it is moved to there.
        on_unwritten: told (step, error), on every rank, of a checkpoint that could not be written, where saving goes on.
        beat: called again and again by a rank that waits for a thread that writes, its own or another rank's.
    """

    def __init__(
        self,
        place: Place,
        *,
        attempt: str,
        keep: int = 2,
        rank: int = 0,
        ranks: int = 1,
        each: Callable[[Any], list[Any]] = lambda value: [value],
        on_quarantine: Callable[[str, str], None] = lambda address, reason: None,
        on_unwritten: Callable[[int, str], None] = lambda step, error: None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.place = place
        self.attempt = attempt
        self.keep = keep
        self.rank, self.ranks, self.each = rank, ranks, each
        self.on_quarantine, self.on_unwritten, self.beat = on_quarantine, on_unwritten, beat
        self._in_flight: _InFlight | None = None
        self._told = True
        self._search: Callable[[], Path | None] | None = None
        """for the newest one, which storage has interrupted"""
        self._failures, self._is_retry = 0, False
        self.newest_step = 0
        """behind which the newest one stands that is whole on every rank; 0: a run without one begins there"""

    def save(
        self,
        step: int,
        backend: Backend,
        rule: nn.Module,
        trainer: Mapping[str, Any],
        *,
        buffers: Mapping[str, Tensor] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Saved | None:
        """Begin to write a checkpoint; collective. It is whole once `done` or `wait` says so; what `wait` says of the one before.

        One before that could not be written is told to `on_unwritten`: storage that failed once may be back.

        `buffers` are this rank's own running statistics, where the network holds the mean over ranks while it is saved.
        `weights` are those to publish, a copy that nobody else changes; None: the network's as they are.

        Raises:
            Refused, OSError: see `settle`.
        """
        before, _ = self.settle()
        files = {f"{backend.name}/{name}": state for name, state in backend.capture().items()}
        files[f"rng_rank{self.rank}.pt"] = {**rng_state(), "buffers": copied(dict(buffers or {}))}
        if self.rank == 0:
            files[WEIGHTS] = dict(weights_of(backend.network) if weights is None else weights)
            if rule.state_dict():
                files["rule.pt"] = copied(rule.state_dict())
            files[TRAINER] = json.dumps({**trainer, "step": step}, indent=1) + "\n"
        name = step_name(step)
        writing = Background(
            self.place,
            name,
            files,
            attempt=f"{self.attempt}.{self._failures}" if self._failures else self.attempt,  # beside what is left of one
            rank=self.rank,
            ranks=self.ranks,
            on_whole=lambda: self._tidy(name),
        )
        self._in_flight, self._told = _InFlight(step, writing), False
        return before

    def done(self) -> Saved | None:
        """On rank 0 what the last `save` has become, once, as soon as it is whole; asks nobody and waits for nothing."""
        flight = self._in_flight
        if self.rank or flight is None or self._told or not flight.writing.whole.done() or flight.writing.whole.exception():
            return None
        self._told = True
        return self._saved(flight)

    def failed(self) -> bool:
        """On rank 0 whether the last `save` is known to have failed; asks nobody and waits for nothing."""
        flight = self._in_flight
        return flight is not None and flight.writing.whole.done() and flight.writing.whole.exception() is not None

    def wait(self) -> Saved | None:
        """Until the last `save` is whole on every rank; collective. On rank 0 what it has become, unless that was told already.

        Raises:
            Refused: it cannot be written, and only the user can change that: the disk is full.
            OSError: it could not be written; on every rank, too. What is whole stays.
        """
        flight, self._in_flight = self._in_flight, None
        if flight is None:
            return None
        writing = flight.writing
        self._agree(flight, writing.part)
        self._agree(flight, writing.whole if self.rank == 0 else writing.part)
        self._is_retry, self.newest_step = False, flight.step
        return self._once(flight)

    def settle(self) -> tuple[Saved | None, bool]:
        """As `wait`, and whether it could not be written, which `on_unwritten` was told: then the state at hand is to be saved.

        Raises:
            Refused: see `wait`.
            OSError: neither it could be written nor the one before.
        """
        flight = self._in_flight
        try:
            return self.wait(), False
        except OSError as error:
            if flight is None or self._is_retry:
                raise
            self._failures, self._is_retry = self._failures + 1, True
            self.on_unwritten(flight.step, error.strerror or str(error))
            return None, True

    def close(self, error: BaseException | None = None) -> Saved | None:
        """Come to an end without the other ranks, of which one may be gone: what has all its parts becomes a checkpoint.

        That it could not be written is noted on `error`, which ends the attempt.
        """
        flight, self._in_flight = self._in_flight, None
        if flight is None:
            return None
        flight.writing.give_up(self.beat)
        failure = flight.writing.whole.exception() if self.rank == 0 else flight.writing.part.exception()
        if failure is not None:
            if error is None:
                raise failure
            error.add_note(f"checkpoint {flight.writing.name} was not written: {type(failure).__name__}: {failure}")
            return None
        return self._once(flight)

    def newest(self) -> Path | None:
        """The newest one that verifies, on this machine; damaged ones are moved away. For rank 0, which tells the others."""
        if self._search is None:  # else storage ended one, which is gone on with: what it has told is not told again
            self._search = partial(newest, self.place, suffix=self._suffix(), on_quarantine=cache(self.on_quarantine))
        found = self._search()
        self._search = None
        return found

    def discard(self, step: int, reason: str) -> None:
        """Quarantine the checkpoint of `step`, if there is one, so that nobody goes on from it. Collective, no save in flight."""
        names = self.place.names() if self.rank == 0 else []
        if step_name(step) in names:
            names.remove(step_name(step))
            quarantine(self.place, step_name(step), reason, suffix=self._suffix(), on_quarantine=self.on_quarantine)
        self.newest_step = self.each(step_of(names[-1]) if names else 0)[0]

    def _suffix(self) -> str:
        return f"{time.strftime('%Y%m%d-%H%M%S')}-{self.attempt}"

    def load(self, path: Path, backend: Backend, rule: nn.Module) -> dict[str, Any]:
        """Load a verified checkpoint into this rank; collective. What its trainer.json says.

        Raises:
            CheckpointError: another backend wrote it, or another number of workers at a ZeRO stage that loads on as many only.
            FileNotFoundError: one of its files is gone since it was verified.
        """
        files = read_manifest((path / MANIFEST).read_bytes())
        for name in files:  # all, as a backend takes what it finds
            (path / name).stat()
        trainer = read_trainer(path)
        if trainer.get("zero", 0) > 0 and trainer["world_size"] != self.ranks:
            wrote = counted(trainer["world_size"], "worker")
            raise CheckpointError(
                f"checkpoint {path.name}: ZeRO-{trainer['zero']} state of {wrote} loads on as many only; got {self.ranks}"
            )
        if not (path / backend.name).is_dir():
            raise CheckpointError(f"checkpoint {path.name}: was not written by backend {backend.name!r}")
        backend.load(path / backend.name)
        if "rule.pt" in files:
            rule.load_state_dict(torch.load(path / "rule.pt", map_location="cpu", weights_only=True))
        rng = f"rng_rank{self.rank}.pt"
        if rng in files:  # there is none for a rank that the writing attempt did not have
            state = torch.load(path / rng, map_location="cpu", weights_only=True)
            set_rng_state(state)
            if trainer.get("world_size") == self.ranks:  # else all begin from the mean, which the backend has loaded
                backend.network.load_state_dict(state["buffers"], strict=False)
        self.newest_step = trainer["step"]
        return trainer

    def _tidy(self, name: str) -> None:
        self.place.tidy(name)
        prune(self.place, name, keep=self.keep)

    def _agree(self, flight: _InFlight, outcome: Future[None]) -> None:
        """Every rank's outcome is good, or every rank raises what the first bad one was, and what was written is deleted."""
        while not all(self.each(_is_done(outcome))):  # together, so that no rank waits for long without a sign of life
            if outcome.done() or flight.writing.gets_on():
                self.beat()
        own = outcome.exception()
        failures = [failure for failure in self.each(None if own is None else _told(own)) if failure is not None]
        if not failures:
            return
        flight.writing.give_up(self.beat)
        self.each(None)
        if self.rank == 0:
            flight.writing.discard()
        number, said = failures[0]
        if number in FOR_THE_USER:
            raise Refused(f"checkpoint: cannot be written after step {flight.step}: {said}; {self._left()}") from own
        raise OSError(number or errno.EIO, f"checkpoint after step {flight.step} was not written: {said}") from own

    def _left(self) -> str:
        names = self.place.names()
        return f"the newest whole one is {self.place.address(names[-1])}" if names else "there is no whole one yet"

    def _once(self, flight: _InFlight) -> Saved | None:
        if self.rank or self._told:
            return None
        self._told = True
        return self._saved(flight)

    def _saved(self, flight: _InFlight) -> Saved:
        writing = flight.writing
        return Saved(writing.address, flight.step, writing.seconds, writing.bytes, writing.untidy)


@dataclass(frozen=True)
class _InFlight:
    step: int
    writing: Background


def _is_done(outcome: Future[None]) -> bool:
    return bool(wait([outcome], timeout=background.WAIT_S).done)


def _told(error: BaseException) -> tuple[int | None, str]:
    """Its number and text, for the other ranks: those of the OSError that torch hides in an error of its own.

    What is refused is the user's business, as what is not permitted.
    """
    if isinstance(error, Refused):
        return errno.EPERM, str(error)
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError):
            number = errno.EPERM if isinstance(found, PermissionError) else found.errno  # s3fs (2026.9) gives it none
            return number, f"{found.strerror or found}" + (f": {found.filename}" if found.filename else "")
        found = found.__cause__ or found.__context__
    return None, f"{type(error).__name__}: {error}"


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """A copy of them on the CPU, as they are published."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in network.state_dict().items()}
