"""Checkpoints that are whole or not there: temp folder, checksums last, rename; verified before anything is loaded.

    checkpoints/step_00000120/
        deepspeed/ | plain/     weights and optimizer state, as the backend writes them
        model.safetensors       the weights alone, for evaluation and publication, without the backend
        rule.pt                 the rule's own state, where it has any
        rng_rank0.pt ...        random number generators of each rank, and its own running statistics
        trainer.json            step, data position, run ids, recipe, totals
        manifest.json           sizes and sha256 of all of these, written last

The newest folder that verifies counts, whatever any scheduler's own list of checkpoints says. A damaged one is moved to
`checkpoints/quarantine/` by name and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from pipeline.backend.base import Backend

MANIFEST = "manifest.json"
TRAINER = "trainer.json"
WEIGHTS = "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, in one line."""


@dataclass(frozen=True)
class Saved:
    path: Path
    step: int
    seconds: float
    bytes: int


class Checkpoints:
    """The checkpoints of one run, written by all of its ranks together.

    Args:
        folder: `RUN/checkpoints`, on storage that every rank sees.
        attempt: names this process group's temp folders, so that workers of an abandoned attempt never meet ours.
        keep: newest checkpoints that survive pruning; the one with the best score, and what is pinned, survive beside them.
        on_quarantine: told (path, reason) for each damaged checkpoint that is moved away.
    """

    def __init__(
        self,
        folder: Path,
        *,
        attempt: str,
        keep: int = 2,
        rank: int = 0,
        on_quarantine: Callable[[Path, str], None] = lambda path, reason: None,
    ) -> None:
        self.folder = folder
        self.attempt = attempt
        self.keep = keep
        self.rank = rank
        self.on_quarantine = on_quarantine

    def save(
        self,
        step: int,
        backend: Backend,
        rule: nn.Module,
        trainer: Mapping[str, Any],
        *,
        buffers: Mapping[str, Tensor] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Saved:
        """Write a checkpoint; collective. When it returns on rank 0, the checkpoint is whole and on disk.

        `buffers` are this rank's own running statistics, where the network holds the mean over ranks while it is saved.
        `weights` are those to publish; None: the network's as they are.
        """
        begun = time.monotonic()
        final = self.folder / step_name(step)
        temp = self.folder / f".writing-{self.attempt}-{step_name(step)}"
        if self.rank == 0:
            shutil.rmtree(temp, ignore_errors=True)
            (temp / backend.name).mkdir(parents=True)
        _barrier()
        backend.save(temp / backend.name)
        torch.save({**rng_state(), "buffers": dict(buffers or {})}, temp / f"rng_rank{self.rank}.pt")
        _barrier()
        size = 0
        if self.rank == 0:
            save_file(dict(weights_of(backend.network) if weights is None else weights), temp / WEIGHTS)
            if rule.state_dict():
                torch.save(rule.state_dict(), temp / "rule.pt")
            _write_json(temp / TRAINER, {**trainer, "step": step})
            size = _seal(temp)
            if final.exists():  # a step redone after a rollback; the redone one is as good and surely whole
                self._delete(final)
            temp.rename(final)
            _sync_folder(self.folder)
            self._prune()
        _barrier()
        return Saved(final, step, time.monotonic() - begun, size)

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies; damaged ones are moved away. For rank 0, which tells the others."""
        if not self.folder.is_dir():
            return None
        for abandoned in (*self.folder.glob(".writing-*"), *self.folder.glob(".deleting-*")):
            shutil.rmtree(abandoned)  # whoever was at it has lost the run's lock: see writer.py
        for path in reversed(step_folders(self.folder)):
            reason = damage(path)
            if reason is None:
                return path
            moved = self.folder / "quarantine" / f"{path.name}-{time.strftime('%Y%m%d-%H%M%S')}-{self.attempt}"
            moved.parent.mkdir(exist_ok=True)
            path.rename(moved)
            self.on_quarantine(moved, reason)
        return None

    def load(self, path: Path, backend: Backend, rule: nn.Module) -> dict[str, Any]:
        """Load a verified checkpoint into this rank; collective. What its trainer.json says.

        Raises:
            CheckpointError: another backend wrote it, or another number of workers at a ZeRO stage that loads on as many only.
        """
        trainer = read_trainer(path)
        if trainer.get("zero", 0) > 0 and trainer["world_size"] != _ranks():
            raise CheckpointError(
                f"checkpoint {path.name}: ZeRO-{trainer['zero']} state of {trainer['world_size']} workers loads on as many only; "
                f"got {_ranks()}"
            )
        if not (path / backend.name).is_dir():
            raise CheckpointError(f"checkpoint {path.name}: was not written by backend {backend.name!r}")
        backend.load(path / backend.name)
        if (path / "rule.pt").exists():
            rule.load_state_dict(torch.load(path / "rule.pt", map_location="cpu", weights_only=True))
        rng = path / f"rng_rank{self.rank}.pt"
        if rng.exists():  # there is none for a rank that the writing attempt did not have
            state = torch.load(rng, map_location="cpu", weights_only=True)
            set_rng_state(state)
            if trainer.get("world_size") == _ranks():  # else all begin from the mean, which the backend has loaded
                backend.network.load_state_dict(state["buffers"], strict=False)
        return trainer

    def _prune(self) -> None:
        folders = step_folders(self.folder)
        best = max((path for path in folders if _score(path) is not None), key=_by_score, default=None)
        for path in folders[: -self.keep]:
            if path != best and not _pin_of(path).exists():
                self._delete(path)

    def _delete(self, path: Path) -> None:
        """Renamed first: a folder that is called a checkpoint is whole, also when we die in the middle of this."""
        doomed = self.folder / f".deleting-{self.attempt}-{path.name}"
        path.rename(doomed)
        shutil.rmtree(doomed)


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """A copy of them on the CPU, as they are published."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}


# ------------------------------------------------------------------------------------------------- reading, for anybody


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def pin(path: Path) -> None:
    """Keep a checkpoint from being pruned: somebody outside of the run knows it by its address."""
    _pin_of(path).touch()


def _pin_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.pinned")  # beside it: what lies in it is sealed


def step_folders(folder: Path) -> list[Path]:
    """Checkpoints that were renamed into place, oldest first; whether they are whole is `damage`'s to say."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def verified(folder: Path, which: str = "last") -> Path:
    """The newest checkpoint that verifies, or the one with the best score.

    Raises:
        CheckpointError: there is none.
    """
    whole = [path for path in step_folders(folder) if damage(path) is None]
    if which == "best":
        whole = sorted((path for path in whole if _score(path) is not None), key=_by_score)
    if not whole:
        kind = "with a score that verifies" if which == "best" else "that verifies"
        raise CheckpointError(f"{folder}: needs a checkpoint {kind}; got none")
    return whole[-1]


def _score(path: Path) -> float | None:
    """None, too, for a damaged checkpoint: it is nobody's best."""
    try:
        return read_trainer(path)["score"]
    except (OSError, ValueError, KeyError):
        return None


def _by_score(path: Path) -> tuple[float, str]:
    score = _score(path)
    return (-1.0 if score is None else score, path.name)


def read_trainer(path: Path) -> dict[str, Any]:
    return json.loads((path / TRAINER).read_text())


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when every byte is as it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        expected = manifest["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing: the write was cut short"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    if manifest.get("sha256") != _files_digest(expected):
        return f"{MANIFEST} is damaged"
    for name, fact in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != fact["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {fact['bytes']}"
        if _sha256(file) != fact["sha256"]:
            return f"{name} differs from its sha256"
    return None


# ----------------------------------------------------------------------------------------------------------- the details


def _seal(temp: Path) -> int:
    """Write every file through to disk and the manifest last; the number of bytes."""
    files = {}
    for file in sorted(path for path in temp.rglob("*") if path.is_file()):
        _sync_file(file)
        files[file.relative_to(temp).as_posix()] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    _write_json(temp / MANIFEST, {"version": 1, "files": files, "sha256": _files_digest(files)})
    _sync_file(temp / MANIFEST)
    _sync_folder(temp)
    return sum(fact["bytes"] for fact in files.values())


def _files_digest(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n")


def _sync_file(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rng_state() -> dict[str, Any]:
    """Of every generator that training may draw from in this process."""
    numpy: Any = np.random.get_state(legacy=False)
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": {
            "keys": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy = state["numpy"]
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["pos"], numpy["has_gauss"], numpy["gauss"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _ranks() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def _barrier() -> None:
    if _ranks() > 1:
        distributed.barrier()
