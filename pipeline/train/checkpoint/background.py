"""The thread in which a rank writes its part of a checkpoint while training goes on.

A checkpoint is complete once all parts are. The threads cannot use collectives, because training
uses them. Instead, each rank leaves a note of its files in the checkpoint's folder. Rank 0's thread
waits for the notes, seals the folder and moves it to its store.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors

from pipeline.core.files import sync_folder, write_whole
from pipeline.train.checkpoint.manifest import Facts, facts_of, seal
from pipeline.train.checkpoint.selection import prune, step_name
from pipeline.train.checkpoint.store import WRITING, CheckpointStore

POLL_S = 0.05
WAIT_S = 1.0  # between two signs of life of a rank that waits for a thread
# For this long a live thread counts as making progress, because an upload shows no progress.
LONGEST_S = 1800.0


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint."""

    address: str
    step: int
    write_s: float  # from the copy of its state until it was complete
    bytes: int
    untidy: str = ""  # the error if an old checkpoint could not be deleted


class Background:
    """One rank's writing of one checkpoint, which begins at once.

    Args:
        files: the contents by file name: text, tensors by name (`.safetensors`), or a value for
            `torch.save`. The dict is emptied during the writing.
        keep: see `prune`, which is called once the checkpoint is complete. An error of `prune` is
            noted in `Saved.untidy`.
    """

    def __init__(
        self,
        store: CheckpointStore,
        step: int,
        files: dict[str, Any],
        *,
        attempt: str,
        rank: int,
        ranks: int,
        keep: int,
    ) -> None:
        self.store, self.step, self.name = store, step, step_name(step)
        self.rank, self.ranks, self.keep = rank, ranks, keep
        self.temp = store.staging / f"{WRITING}{attempt}-{self.name}"
        # The complete checkpoint on rank 0. None on another rank, once its part is written.
        self.outcome: Future[Saved | None] = Future()
        self._is_taken, self._nobody_waits = False, threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(
            target=self._run, args=(files,), daemon=True, name=f"checkpoint {self.name}"
        )
        self._thread.start()

    def failure(self) -> BaseException | None:
        """The error of a thread that has failed."""
        return self.outcome.exception() if self.outcome.done() else None

    def take(self) -> Saved | None:
        """The result at the first call, then None. Raises: the error of the thread."""
        is_taken, self._is_taken = self._is_taken, True
        return None if is_taken else self.outcome.result()

    def makes_progress(self) -> bool:
        """Whether the thread may still succeed. A rank that waits for a hung thread gives no sign
        of life.
        """
        return self.outcome.done() or time.monotonic() - self._began < LONGEST_S

    def give_up(self, beat: Callable[[], None]) -> None:
        """Wait for the end of the thread. From now on it waits for other ranks only briefly."""
        self._nobody_waits.set()
        while self._thread.is_alive():
            self._thread.join(WAIT_S)
            if self.makes_progress():
                beat()

    def _run(self, files: dict[str, Any]) -> None:
        try:
            facts = self._write(files)
            saved = self._finish(facts) if self.rank == 0 else None
        except BaseException as error:  # raised by whoever waits for the outcome
            with contextlib.suppress(OSError):  # then rank 0 learns of it at the next collective
                if self.rank:
                    self._note("failed").touch()
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(saved)

    def _write(self, files: dict[str, Any]) -> Facts:
        names = list(files)
        for name in names:
            (self.temp / name).parent.mkdir(parents=True, exist_ok=True)
            _write(self.temp / name, files.pop(name))
        for folder in {(self.temp / name).parent for name in names}:
            sync_folder(folder)
        facts = facts_of(self.temp, names)
        if self.rank:
            write_whole(self._note("json"), json.dumps(facts).encode())
        return facts

    def _finish(self, facts: Facts) -> Saved:
        patience = time.monotonic() - self._began + 1.0  # about as long as this rank took
        for rank in range(1, self.ranks):
            facts |= self._facts_of(rank, patience)
        seal(self.temp, facts)
        address, untidy = self.store.finish(self.temp, self.name), ""
        try:
            prune(self.store, self.name, keep=self.keep)
        except Exception as error:
            untidy = f"{type(error).__name__}: {error}"
        return Saved(
            address,
            self.step,
            write_s=time.monotonic() - self._began,
            bytes=sum(fact["bytes"] for fact in facts.values()),
            untidy=untidy,
        )

    def _facts_of(self, rank: int, patience: float) -> Facts:
        """The facts in another rank's note. Waits for the note, but after `give_up` for at most
        `patience` seconds.
        """
        note, until = self._note("json", rank), time.monotonic() + patience
        while not note.exists():
            if self._note("failed", rank).exists():
                raise RuntimeError(
                    f"checkpoint {self.name}: worker {rank} could not write its part"
                )
            if not self.temp.is_dir():
                raise RuntimeError(
                    f"checkpoint {self.name}: {self.temp} is gone, as if another driver had taken"
                    " the store over"
                )
            if self._nobody_waits.is_set() and time.monotonic() > until:
                raise RuntimeError(f"checkpoint {self.name}: the part of worker {rank} is missing")
            time.sleep(POLL_S)
        facts = json.loads(note.read_text())
        note.unlink()
        return facts

    def _note(self, kind: str, rank: int | None = None) -> Path:
        return self.temp / f".{self.rank if rank is None else rank}.{kind}"


def _write(file: Path, value: Any) -> None:
    with file.open("wb") as stream:  # Python's own file: a full disk is an OSError with a number
        if isinstance(value, str):
            stream.write(value.encode())
        elif file.suffix == ".safetensors":
            stream.write(safetensors.save(value))
        else:
            torch.save(value, stream)
        stream.flush()
        os.fsync(stream.fileno())
