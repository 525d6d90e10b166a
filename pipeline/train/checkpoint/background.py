"""The thread in which a rank writes its part of a checkpoint during training.

A checkpoint needs the part of every rank. The threads cannot use collectives, because training uses
them at the same time. Instead, each rank except 0 lists its files in a note, a file in the
checkpoint's folder. The thread of rank 0 waits for the notes, writes the manifest and moves the
folder to the store.
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
WAIT_S = 1.0  # pause between two calls of `beat` while a rank waits for a thread
# A thread is considered hung after this time. An upload reports no progress.
LONGEST_S = 1800.0


@dataclass(frozen=True)
class SavedCheckpoint:
    """A complete checkpoint."""

    address: str
    step: int
    # seconds from the copy of the state until the checkpoint was complete and old ones were deleted
    write_s: float
    bytes: int
    prune_error: str = ""  # the error if an old checkpoint could not be deleted


class Background:
    """Writes one rank's part of one checkpoint in a thread, which starts at once.

    Args:
        files: the contents by file name: text, tensors by name (`.safetensors`), or a value for
            `torch.save`. The thread removes each entry that it writes.
        attempt: a part of the temporary folder's name.
        keep: see `prune`, which rank 0 calls once the checkpoint is complete. An error of `prune`
            is the `prune_error` of the result.
    """

    def __init__(
        self,
        store: CheckpointStore,
        step: int,
        files: dict[str, Any],
        *,
        attempt: str,
        rank: int,
        world_size: int,
        keep: int,
    ) -> None:
        self.store, self.step, self.name = store, step, step_name(step)
        self.rank, self.world_size, self.keep = rank, world_size, keep
        self.temp = store.staging / f"{WRITING}{attempt}-{self.name}"
        # The result is the complete checkpoint on rank 0. It is None on any other rank, and is set
        # once that rank has written its part.
        self.outcome: Future[SavedCheckpoint | None] = Future()
        self._is_taken, self._is_closing = False, threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(
            target=self._run, args=(files,), daemon=True, name=f"checkpoint {self.name}"
        )
        self._thread.start()

    def failure(self) -> BaseException | None:
        """The error of the thread if it has failed, else None."""
        return self.outcome.exception() if self.outcome.done() else None

    def take(self) -> SavedCheckpoint | None:
        """The first call waits for the result and returns it. Later calls return None.

        Raises:
            Exception: the error of the thread, at the first call.
        """
        is_taken, self._is_taken = self._is_taken, True
        return None if is_taken else self.outcome.result()

    def makes_progress(self) -> bool:
        """Whether the thread has ended or is not yet considered hung. A rank that waits for a hung
        thread does not reset its watchdog.
        """
        return self.outcome.done() or time.monotonic() - self._began < LONGEST_S

    def give_up(self, beat: Callable[[], None]) -> None:
        """Wait until the thread ends. The thread now waits only briefly for other ranks."""
        self._is_closing.set()
        while self._thread.is_alive():
            self._thread.join(WAIT_S)
            if self.makes_progress():
                beat()

    def _run(self, files: dict[str, Any]) -> None:
        try:
            facts = self._write_files(files)
            saved = self._finish(facts) if self.rank == 0 else None
        except BaseException as error:  # `take` raises it
            # Without this note, rank 0 would learn of the failure only at the next collective.
            with contextlib.suppress(OSError):
                if self.rank:
                    self._note("failed", self.rank).touch()
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(saved)

    def _write_files(self, files: dict[str, Any]) -> Facts:
        names = list(files)
        for name in names:
            (self.temp / name).parent.mkdir(parents=True, exist_ok=True)
            _write(self.temp / name, files.pop(name))
        for folder in {(self.temp / name).parent for name in names}:
            sync_folder(folder)
        facts = facts_of(self.temp, names)
        if self.rank:
            write_whole(self._note("json", self.rank), json.dumps(facts).encode())
        return facts

    def _finish(self, facts: Facts) -> SavedCheckpoint:
        timeout_s = time.monotonic() - self._began + 1.0  # about as long as this rank took
        for rank in range(1, self.world_size):
            facts |= self._read_note(rank, timeout_s)
        seal(self.temp, facts)
        address = self.store.finish(self.temp, self.name)
        prune_error = ""
        try:
            prune(self.store, self.name, keep=self.keep)
        except Exception as error:
            prune_error = f"{type(error).__name__}: {error}"
        return SavedCheckpoint(
            address,
            self.step,
            write_s=time.monotonic() - self._began,
            bytes=sum(fact["bytes"] for fact in facts.values()),
            prune_error=prune_error,
        )

    def _read_note(self, rank: int, timeout_s: float) -> Facts:
        """The facts in another rank's note. The call waits for the note. After `give_up`, it
        waits no longer than `timeout_s` seconds from its start.
        """
        note, deadline = self._note("json", rank), time.monotonic() + timeout_s
        while not note.exists():
            if self._note("failed", rank).exists():
                raise RuntimeError(
                    f"checkpoint {self.name}: worker {rank} could not write its part"
                )
            if not self.temp.is_dir():
                raise RuntimeError(
                    f"checkpoint {self.name}: {self.temp} was deleted; another driver may own the"
                    " store now"
                )
            if self._is_closing.is_set() and time.monotonic() > deadline:
                raise RuntimeError(f"checkpoint {self.name}: the part of worker {rank} is missing")
            time.sleep(POLL_S)
        facts = json.loads(note.read_text())
        note.unlink()
        return facts

    def _note(self, suffix: str, rank: int) -> Path:
        return self.temp / f".{rank}.{suffix}"


def _write(file: Path, value: Any) -> None:
    with file.open("wb") as stream:  # a Python file: a full disk raises an OSError with an errno
        if isinstance(value, str):
            stream.write(value.encode())
        elif file.suffix == ".safetensors":
            stream.write(safetensors.save(value))
        else:
            torch.save(value, stream)
        stream.flush()
        os.fsync(stream.fileno())
