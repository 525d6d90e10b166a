"""The thread in which a rank writes its part of a checkpoint while training goes on.

A checkpoint is whole once the parts of all ranks are. Threads of several ranks cannot ask one another through collectives,
which are training's: each rank notes in the checkpoint's folder what it has written, and rank 0's thread waits for the notes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors

from pipeline.checkpoint.place import WRITING, Place
from pipeline.checkpoint.sealed import Facts, facts_of, seal, write_json
from pipeline.disk import sync_folder

POLL_S = 0.05
WAIT_S = 1.0
"""that training waits for the thread without a sign of life"""
LONGEST_S = 1800.0
"""from its beginning, that a thread which lives is taken to get on: how far an upload is, or a download, shows nowhere"""


class Abandoned(RuntimeError):
    """A part is missing, and nobody waits for it any more."""


class Background:
    """One rank's writing of one checkpoint; it has begun.

    Args:
        files: what to write, by name: text, tensors by name (`.safetensors`), or what `torch.save` takes. Emptied, as what
            is written need not be held.
        on_whole: rank 0 calls it, in the thread, when the checkpoint is whole, which stays so whatever this raises.
    """

    def __init__(
        self,
        place: Place,
        name: str,
        files: dict[str, Any],
        *,
        attempt: str,
        rank: int,
        ranks: int,
        on_whole: Callable[[], None],
    ) -> None:
        self.place, self.name, self.rank, self.ranks, self.on_whole = place, name, rank, ranks, on_whole
        self.temp = place.staging / f"{WRITING}{attempt}-{name}"
        self.seconds, self.bytes, self.address = 0.0, 0, ""
        self.untidy = ""
        """what `on_whole` raised, in words"""
        self.part: Future[None] = Future()
        """this rank's files are where they belong"""
        self.whole: Future[None] = Future()
        """on rank 0: the checkpoint is one"""
        self._nobody_waits = threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run, args=(files,), daemon=True, name=f"checkpoint {name}")
        self._thread.start()

    def give_up(self, beat: Callable[[], None]) -> None:
        """Wait for no other rank for long from now on, and until this one has come to its end, good or bad.

        `beat` is called meanwhile, while it gets on.
        """
        self._nobody_waits.set()
        while self._thread.is_alive():
            self._thread.join(WAIT_S)
            if self.gets_on():
                beat()

    def gets_on(self) -> bool:
        """As far as anybody knows; else it may hang, and whoever waits for it shows no sign of life, so that a watchdog looks."""
        return time.monotonic() - self._began < LONGEST_S

    def discard(self) -> None:
        """Delete what was written, to make room; for rank 0, once every rank has given up."""
        shutil.rmtree(self.temp, ignore_errors=True)

    def _run(self, files: dict[str, Any]) -> None:
        try:
            facts = self._write(files)
        except BaseException as error:  # whoever waits for the future raises it
            self.part.set_exception(error)
            self.whole.set_exception(error)
            if self.rank:
                with contextlib.suppress(OSError):  # of storage that fails; then rank 0 hears of it when they next meet
                    self._failure(self.rank).touch()
            return
        self.part.set_result(None)
        try:
            if self.rank == 0:
                facts |= self._others(time.monotonic() - self._began)
                seal(self.temp, facts)
                self.address = self.place.finish(self.temp, self.name)
                self.bytes = sum(fact["bytes"] for fact in facts.values())
                self._tell_whole()
        except BaseException as error:
            self.whole.set_exception(error)
            return
        self.seconds = time.monotonic() - self._began
        self.whole.set_result(None)

    def _tell_whole(self) -> None:
        try:
            self.on_whole()
        except Exception as error:
            self.untidy = f"{type(error).__name__}: {error}"

    def _write(self, files: dict[str, Any]) -> Facts:
        names = list(files)
        for name in names:
            (self.temp / name).parent.mkdir(parents=True, exist_ok=True)
            _write(self.temp / name, files.pop(name))
        facts = facts_of(self.temp, names)
        for folder in {(self.temp / name).parent for name in names}:
            sync_folder(folder)
        self.place.put(self.temp, self.name, names)
        if self.rank:
            new = self.temp / f".{self.rank}.new"
            write_json(new, facts)
            new.rename(self._note(self.rank))
        return facts

    def _others(self, own_s: float) -> Facts:
        """What the other ranks have written; waits for them, once nobody waits for long about as long as this rank took."""
        facts: Facts = {}
        patience = time.monotonic() + own_s + 1.0
        for rank in range(1, self.ranks):
            note = self._note(rank)
            while not note.exists():
                if self._failure(rank).exists():
                    raise Abandoned(f"checkpoint {self.name}: worker {rank} could not write its part")
                if not self.temp.is_dir():
                    raise Abandoned(f"checkpoint {self.name}: {self.temp} is gone, as if another driver had taken the place over")
                if self._nobody_waits.is_set() and time.monotonic() > patience:
                    raise Abandoned(f"checkpoint {self.name}: the part of worker {rank} is missing")
                time.sleep(POLL_S)
            facts |= json.loads(note.read_text())
            note.unlink()
        return facts

    def _note(self, rank: int) -> Path:
        return self.temp / f".{rank}.json"

    def _failure(self, rank: int) -> Path:
        return self.temp / f".{rank}.failed"


def _write(file: Path, value: Any) -> None:
    with file.open("wb") as stream:  # Python's own: a full disk is an OSError with a number
        if isinstance(value, str):
            stream.write(value.encode())
        elif file.suffix == ".safetensors":
            stream.write(safetensors.save(value))
        else:
            torch.save(value, stream)
        stream.flush()
        os.fsync(stream.fileno())
