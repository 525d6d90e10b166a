"""Saves and restores checkpoints. Training waits while its state is copied; a thread writes the
copy.
"""

import contextlib
import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from pipeline.core.errors import UserError
from pipeline.core.files import FOR_THE_USER, sync_folder, write_whole
from pipeline.core.tensor_file import find_code
from pipeline.core.units import counted
from pipeline.train.backend.base import Backend, cpu_copy
from pipeline.train.checkpoint.manifest import (
    MANIFEST,
    Facts,
    facts_of,
    find_damage,
    read_manifest,
    seal,
)
from pipeline.train.checkpoint.selection import prune, step_name
from pipeline.train.checkpoint.store import TRAINER, WRITING, CheckpointError, CheckpointStore

WEIGHTS = "model.safetensors"

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

    A checkpoint needs the part of every rank. The threads cannot use collectives, because training
    uses them at the same time. Instead, each rank except 0 lists its files in a note, a file in the
    checkpoint's folder. The thread of rank 0 waits for the notes, writes the manifest and moves the
    folder to the store.

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


class Checkpoints:
    """The checkpoints of one run, which all of its ranks write together.

    Args:
        store: the store that holds the checkpoints.
        attempt: a name for this group of workers. Workers of an abandoned attempt write to other
            folders.
        keep: the number of newest checkpoints that stay. The best by score and the pinned ones
            stay, too.
        ranks: the number of ranks.
        each: gathers every rank's value, in the order of ranks, on every rank; see
            `Ranks.all_gather_object`.
        on_quarantine: called on rank 0 with the new address of a checkpoint and the reason, before
            the checkpoint is moved to `quarantine/`.
        on_unwritten: called on every rank with step and error if a checkpoint could not be written
            and the run continues.
        beat: called repeatedly by a rank that waits for a thread.
    """

    def __init__(
        self,
        store: CheckpointStore,
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
        self.store, self.attempt, self.keep = store, attempt, keep
        self.rank, self.ranks, self.each = rank, ranks, each
        self.on_quarantine, self.on_unwritten, self.beat = on_quarantine, on_unwritten, beat
        self._writing: Background | None = None
        self._failures, self._is_retry = 0, False
        # Step of the newest complete checkpoint; 0: the run's beginning.
        self.newest_step = 0

    def save(
        self,
        step: int,
        backend: Backend,
        rule: nn.Module,
        trainer: Mapping[str, Any],
        *,
        buffers: Mapping[str, Tensor] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> SavedCheckpoint | None:
        """Begin to write a checkpoint. Collective. The checkpoint is complete once `done`, `wait`
        or the next `save` returns it.

        Args:
            buffers: this rank's own buffers, if the network holds their mean over ranks.
            weights: the weights to publish, a copy that nothing else changes; None: the network's
                weights.

        Returns:
            The previous checkpoint, as `wait` does; None if it could not be written. `on_unwritten`
            is then called, and the new checkpoint is still written.

        Raises:
            UserError, OSError: see `settle`.
        """
        previous, _ = self.settle()
        files = {f"{backend.name}/{name}": state for name, state in backend.capture().items()}
        files[f"buffers_rank{self.rank}.pt"] = cpu_copy(dict(buffers or {}))
        if self.rank == 0:
            files[WEIGHTS] = dict(weights_of(backend.network) if weights is None else weights)
            if rule.state_dict():
                files["rule.pt"] = cpu_copy(rule.state_dict())
            files[TRAINER] = json.dumps({**trainer, "step": step}, indent=1) + "\n"
        # After a failed save, a new name: files of that save may be left under the old name.
        self._writing = Background(
            self.store,
            step,
            files,
            attempt=f"{self.attempt}.{self._failures}" if self._failures else self.attempt,
            rank=self.rank,
            world_size=self.ranks,
            keep=self.keep,
        )
        return previous

    def done(self) -> SavedCheckpoint | None:
        """The checkpoint of the last `save` on rank 0, if it is complete and was not returned
        before; else None. Does not wait.
        """
        writing = self._writing
        if writing is not None and writing.outcome.done() and not writing.failure():
            return writing.take()
        return None

    def failed(self) -> bool:
        """Whether the last `save` has failed on this rank. On rank 0: whether it has failed on any
        rank. Does not wait.
        """
        return self._writing is not None and self._writing.failure() is not None

    def wait(self) -> SavedCheckpoint | None:
        """Wait until the checkpoint of the last `save` is complete. Collective. Returns it on rank
        0, unless it was returned before.

        Complete checkpoints stay if an error is raised. Every rank raises it.

        Raises:
            UserError: the checkpoint cannot be written until the user changes something, such as a
                full disk.
            OSError: the checkpoint could not be written for another reason.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        self._wait_for_all_ranks(writing)
        self._is_retry, self.newest_step = False, writing.step
        return writing.take()

    def settle(self) -> tuple[SavedCheckpoint | None, bool]:
        """As `wait`. Also returns whether the checkpoint could not be written and is lost. If it is
        lost, the caller must save the current state.

        Raises:
            UserError: see `wait`.
            OSError: neither this checkpoint nor the previous one could be written.
        """
        writing = self._writing
        try:
            return self.wait(), False
        except OSError as error:
            if writing is None or self._is_retry:
                raise
            self._failures, self._is_retry = self._failures + 1, True
            self.on_unwritten(writing.step, error.strerror or str(error))
            return None, True

    def close(self, error: BaseException | None = None) -> SavedCheckpoint | None:
        """End without collectives, because another rank may have ended. Returns the checkpoint of
        the last `save` on rank 0, if all ranks have written their parts.

        Args:
            error: the error that ends the attempt. A failure to write is added to it as a note.

        Raises:
            Exception: a failure to write, if there is no `error`.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        writing.give_up(self.beat)
        failure = writing.failure()
        if failure is None or error is None:
            return writing.take()
        error.add_note(
            f"checkpoint {writing.name} was not written: {type(failure).__name__}: {failure}"
        )
        return None

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies; None if there is none. Call it on rank 0 only.

        Damaged checkpoints are moved to `quarantine/`.

        Raises:
            CheckpointError: a file of this checkpoint would run code when it is loaded, or another
                driver owns the store.
            OSError: the storage failed. A later call may succeed.
        """
        self.store.sweep()
        for name in reversed(self.store.names()):
            path = self.store.fetch(name)
            reason = find_damage(path)
            if reason is not None:
                self._quarantine(name, reason)
            elif code := find_code(path):
                raise CheckpointError(
                    f"checkpoint {path}: must hold data alone; {code}; move the checkpoint to"
                    " another folder if it is not yours"
                )
            else:
                return path
        return None

    def discard(self, step: int, reason: str) -> None:
        """Move the checkpoint of `step` to `quarantine/`, if there is one. Collective. No save may
        be in progress.
        """
        names = self.store.names() if self.rank == 0 else []
        if step_name(step) in names:
            names.remove(step_name(step))
            self._quarantine(step_name(step), reason)
        self.newest_step = self.each(int(names[-1].removeprefix("step_")) if names else 0)[0]

    def _quarantine(self, name: str, reason: str) -> None:
        """Report the new address of a checkpoint and the reason, then move the checkpoint.

        The report comes first. Otherwise, if the process died after the move, the journal would not
        say why the checkpoint is missing. If the move fails, the next call reports the checkpoint
        again.
        """
        folder = PurePosixPath(self.store.address(name)).name
        target = f"quarantine/{folder}-{time.strftime('%Y%m%d-%H%M%S')}-{self.attempt}"
        self.on_quarantine(self.store.address(target), reason)
        self.store.set_aside(name, target)

    def load(self, path: Path, backend: Backend, rule: nn.Module) -> dict[str, Any]:
        """Load a verified checkpoint into this rank. Collective. Returns its trainer.json.

        Raises:
            CheckpointError: another backend wrote the checkpoint, or it has ZeRO state of another
                number of workers.
            FileNotFoundError: a file of the checkpoint was deleted after it was verified.
        """
        files = read_manifest((path / MANIFEST).read_bytes())
        for name in files:  # a backend may not notice a missing file
            (path / name).stat()
        trainer = read_trainer(path)
        if trainer.get("zero", 0) > 0 and trainer["world_size"] != self.ranks:
            raise CheckpointError(
                f"checkpoint {path.name}: ZeRO-{trainer['zero']} state must be loaded by"
                f" {counted(trainer['world_size'], 'worker')}, which wrote it; got {self.ranks}"
            )
        if not (path / backend.name).is_dir():
            raise CheckpointError(
                f"checkpoint {path.name}: must be of backend {backend.name!r}; another one wrote it"
            )
        backend.load(path / backend.name)
        if "rule.pt" in files:
            rule.load_state_dict(
                torch.load(path / "rule.pt", map_location="cpu", weights_only=True)
            )
        own = f"buffers_rank{self.rank}.pt"
        # At another number of ranks the buffers keep the mean over ranks.
        if trainer.get("world_size") == self.ranks:
            if own not in files:
                raise CheckpointError(f"checkpoint {path.name}: must have {own}; it has not")
            buffers = torch.load(path / own, map_location="cpu", weights_only=True)
            backend.network.load_state_dict(buffers, strict=False)
        self.newest_step = trainer["step"]
        return trainer

    def _wait_for_all_ranks(self, writing: Background) -> None:
        """Wait until every rank has written its part. If a rank fails, delete the files and raise
        the error on every rank.

        The ranks exchange their states repeatedly, so each of them can reset its watchdog.
        """
        while True:
            wait([writing.outcome], timeout=WAIT_S)
            states = self.each((writing.outcome.done(), writing.failure() is not None))
            if any(has_failed for _, has_failed in states):
                break
            if all(is_done for is_done, _ in states):
                return
            if writing.makes_progress():
                self.beat()
        writing.give_up(self.beat)
        own_error = writing.failure()
        failures = self.each(None if own_error is None else _errno_and_text(own_error))
        if self.rank == 0:
            shutil.rmtree(writing.temp, ignore_errors=True)
        # Prefer an error with an errno: rank 0's error may only say that another rank failed.
        number, text = min(filter(None, failures), key=lambda failure: failure[0] is None)
        if number in FOR_THE_USER:
            names = self.store.names()
            newest = f"the newest complete one is {self.store.address(names[-1])}" if names else ""
            raise UserError(
                f"checkpoint: cannot be written after step {writing.step}: {text};"
                f" {newest or 'there is no complete one yet'}"
            ) from own_error
        raise OSError(
            number or errno.EIO, f"checkpoint after step {writing.step} was not written: {text}"
        ) from own_error


def _errno_and_text(error: BaseException) -> tuple[int | None, str]:
    """The errno of an error, or None, and its text. Both can be sent to other ranks.

    torch raises an error of its own, which has the OSError as its cause or context. A UserError
    counts as a missing permission, because only the user can resolve either.
    """
    if isinstance(error, UserError):
        return errno.EPERM, str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):  # s3fs (2026.9) raises PermissionError without an errno
            number = errno.EPERM if isinstance(cause, PermissionError) else cause.errno
            file = f": {cause.filename}" if cause.filename else ""
            return number, f"{cause.strerror or cause}{file}"
        cause = cause.__cause__ or cause.__context__
    return None, f"{type(error).__name__}: {error}"


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """A contiguous copy of the network's state_dict on the CPU, for safetensors."""
    return {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in network.state_dict().items()
    }


def read_trainer(path: Path) -> dict[str, Any]:
    """The content of trainer.json in a checkpoint's folder.

    Raises:
        ValueError: trainer.json is damaged.
        OSError: trainer.json cannot be read, or is missing.
    """
    return json.loads((path / TRAINER).read_bytes())
