"""Saving and restoring: training waits for a copy of its state, which a thread writes."""

import errno
import json
import random
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.core.errors import UserError
from pipeline.core.files import FOR_THE_USER
from pipeline.core.tensor_file import find_code
from pipeline.core.units import counted
from pipeline.train.backend.base import Backend, copied
from pipeline.train.checkpoint import background
from pipeline.train.checkpoint.background import Background, Saved
from pipeline.train.checkpoint.manifest import MANIFEST, damage, read_manifest
from pipeline.train.checkpoint.selection import step_name
from pipeline.train.checkpoint.store import TRAINER, CheckpointError, CheckpointStore

WEIGHTS = "model.safetensors"


class Checkpoints:
    """The checkpoints of one run, written by all of its ranks together.

    Args:
        store: the store where they are kept.
        attempt: the name of this process group. Workers of an abandoned group write elsewhere.
        keep: the newest checkpoints that stay, beside the best by score and the pinned ones.
        ranks: the number of ranks.
        each: gathers every rank's value, in the order of ranks, on every rank; see
            `Ranks.all_gather_object`.
        on_quarantine: called with address and reason of a damaged checkpoint before it is moved.
        on_unwritten: called on every rank with step and error if a checkpoint could not be written
            and saving goes on.
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
        # Step of the newest checkpoint that is complete on every rank; 0: the run's beginning.
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
    ) -> Saved | None:
        """Begin to write a checkpoint. Collective. It is complete once `done` or `wait` returns it.

        Args:
            buffers: this rank's own running statistics; the network holds the mean over ranks.
            weights: the weights to publish, a copy that nothing else changes; None: the network's.

        Returns:
            The previous checkpoint, as `wait` does. If it could not be written, `on_unwritten` is
            called and saving goes on: the storage may be back.

        Raises:
            UserError, OSError: see `settle`.
        """
        before, _ = self.settle()
        files = {f"{backend.name}/{name}": state for name, state in backend.capture().items()}
        files[f"rng_rank{self.rank}.pt"] = {**rng_state(), "buffers": copied(dict(buffers or {}))}
        if self.rank == 0:
            files[WEIGHTS] = dict(weights_of(backend.network) if weights is None else weights)
            if rule.state_dict():
                files["rule.pt"] = copied(rule.state_dict())
            files[TRAINER] = json.dumps({**trainer, "step": step}, indent=1) + "\n"
        # A failed save may have left files under its own name.
        self._writing = Background(
            self.store,
            step,
            files,
            attempt=f"{self.attempt}.{self._failures}" if self._failures else self.attempt,
            rank=self.rank,
            ranks=self.ranks,
            keep=self.keep,
        )
        return before

    def done(self) -> Saved | None:
        """The checkpoint of the last `save`, once, on rank 0, as soon as it is complete. Does not
        wait.
        """
        writing = self._writing
        if writing is not None and writing.outcome.done() and not writing.failure():
            return writing.take()
        return None

    def failed(self) -> bool:
        """Whether the last `save` has failed: on this rank, or for rank 0 on any. Does not wait."""
        return self._writing is not None and self._writing.failure() is not None

    def wait(self) -> Saved | None:
        """Wait until the last `save` is complete. Collective. Returns its checkpoint on rank 0,
        unless it was returned before.

        Raises:
            UserError: it cannot be written, and only the user can change that: the disk is full.
            OSError: it could not be written. Every rank raises both errors. Complete checkpoints
                stay.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        self._agree(writing)
        self._is_retry, self.newest_step = False, writing.step
        return writing.take()

    def settle(self) -> tuple[Saved | None, bool]:
        """As `wait`, and whether the checkpoint is lost. The current state must then be saved.

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

    def close(self, error: BaseException | None = None) -> Saved | None:
        """End without collectives, because another rank may be gone.

        A checkpoint with all parts is completed. A failure to write is noted on `error`, the error
        that ends the attempt."""
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
        """The newest checkpoint that verifies. Damaged ones are quarantined. For rank 0.

        Raises:
            CheckpointError: it verifies, but one of its files would run code when it is loaded.
            OSError: the storage failed. A later call continues.
        """
        self.store.sweep()
        for name in reversed(self.store.names()):
            path = self.store.fetch(name)
            reason = damage(path)
            if reason is not None:
                self._quarantine(name, reason)
            elif code := find_code(path):
                raise CheckpointError(
                    f"checkpoint {path}: must hold data alone; {code}; move it away if it is not"
                    " yours"
                )
            else:
                return path
        return None

    def discard(self, step: int, reason: str) -> None:
        """Quarantine the checkpoint of `step`, if there is one. Collective. No save may be in
        progress.
        """
        names = self.store.names() if self.rank == 0 else []
        if step_name(step) in names:
            names.remove(step_name(step))
            self._quarantine(step_name(step), reason)
        self.newest_step = self.each(int(names[-1].removeprefix("step_")) if names else 0)[0]

    def _quarantine(self, name: str, reason: str) -> None:
        """Report a checkpoint with its new address and the reason, then move it there.

        The report comes first. Otherwise the journal might never explain why a checkpoint that it
        names is missing. If storage fails in between, the next try reports it once more.
        """
        folder = PurePosixPath(self.store.address(name)).name
        aside = f"quarantine/{folder}-{time.strftime('%Y%m%d-%H%M%S')}-{self.attempt}"
        self.on_quarantine(self.store.address(aside), reason)
        self.store.set_aside(name, aside)

    def load(self, path: Path, backend: Backend, rule: nn.Module) -> dict[str, Any]:
        """Load a verified checkpoint into this rank; collective. Returns its trainer.json.

        Raises:
            CheckpointError: another backend wrote it, or another number of workers with ZeRO.
            FileNotFoundError: one of its files is gone since it was verified.
        """
        files = read_manifest((path / MANIFEST).read_bytes())
        for name in files:  # a backend does not notice a missing file
            (path / name).stat()
        trainer = read_trainer(path)
        if trainer.get("zero", 0) > 0 and trainer["world_size"] != self.ranks:
            raise CheckpointError(
                f"checkpoint {path.name}: ZeRO-{trainer['zero']} state of"
                f" {counted(trainer['world_size'], 'worker')} loads on as many only; got"
                f" {self.ranks}"
            )
        if not (path / backend.name).is_dir():
            raise CheckpointError(
                f"checkpoint {path.name}: was not written by backend {backend.name!r}"
            )
        backend.load(path / backend.name)
        if "rule.pt" in files:
            rule.load_state_dict(
                torch.load(path / "rule.pt", map_location="cpu", weights_only=True)
            )
        rng = f"rng_rank{self.rank}.pt"
        if rng in files:  # an attempt with fewer ranks wrote none for this one
            state = torch.load(path / rng, map_location="cpu", weights_only=True)
            set_rng_state(state)
            if trainer.get("world_size") == self.ranks:  # else the loaded mean stays
                backend.network.load_state_dict(state["buffers"], strict=False)
        self.newest_step = trainer["step"]
        return trainer

    def _agree(self, writing: Background) -> None:
        """Wait until every rank has written. If one fails, delete the files and raise on all ranks.

        The ranks exchange their states repeatedly, so that each of them gives signs of life.
        """
        while True:
            wait([writing.outcome], timeout=background.WAIT_S)
            states = self.each((writing.outcome.done(), writing.failure() is not None))
            if any(has_failed for _, has_failed in states):
                break
            if all(is_done for is_done, _ in states):
                return
            if writing.makes_progress():
                self.beat()
        writing.give_up(self.beat)
        own = writing.failure()
        failures = self.each(own and _described(own))
        if self.rank == 0:
            shutil.rmtree(writing.temp, ignore_errors=True)
        # Rank 0's own error may only report the failure of another rank. It then has no number.
        number, reason = min(filter(None, failures), key=lambda failure: failure[0] is None)
        if number in FOR_THE_USER:
            names = self.store.names()
            left = f"the newest whole one is {self.store.address(names[-1])}" if names else ""
            raise UserError(
                f"checkpoint: cannot be written after step {writing.step}: {reason};"
                f" {left or 'there is no whole one yet'}"
            ) from own
        raise OSError(
            number or errno.EIO, f"checkpoint after step {writing.step} was not written: {reason}"
        ) from own


def _described(error: BaseException) -> tuple[int | None, str]:
    """The number and text of an error, for the other ranks.

    torch hides an OSError in an error of its own. A UserError counts as a missing permission: only
    the user can change either.
    """
    if isinstance(error, UserError):
        return errno.EPERM, str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):  # s3fs (2026.9) gives a PermissionError no number
            number = errno.EPERM if isinstance(cause, PermissionError) else cause.errno
            return number, f"{cause.strerror or cause}" + (
                f": {cause.filename}" if cause.filename else ""
            )
        cause = cause.__cause__ or cause.__context__
    return None, f"{type(error).__name__}: {error}"


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the network's weights on the CPU, as they are published."""
    return {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in network.state_dict().items()
    }


def read_trainer(path: Path) -> dict[str, Any]:
    """The content of trainer.json in a checkpoint's folder.

    Raises:
        ValueError: it is damaged.
    """
    return json.loads((path / TRAINER).read_bytes())


def rng_state() -> dict[str, Any]:
    """The state of every random number generator of this process, as a checkpoint holds it."""
    numpy: Any = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": {
            "keys": torch.from_numpy(numpy[1].astype(np.int64)),
            **dict(zip(("pos", "has_gauss", "gauss"), numpy[2:], strict=True)),
        },
    }
    if torch.cuda.is_initialized():  # otherwise the call would create a context on a GPU
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore the state that `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    keys, *rest = state["numpy"].values()
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
