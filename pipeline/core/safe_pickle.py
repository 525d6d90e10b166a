"""Checkpoint files that torch.save wrote are pickles, and a pickle can run code when it is read.
These must hold data alone.

Checksums are no guard: whoever can change a checkpoint can write its manifest anew. So what the
files name is looked at before anything is loaded, and they are loaded with `weights_only`, which
calls nothing but what is listed (torch 2.13)."""

from __future__ import annotations

import importlib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

DEEPSPEED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""what DeepSpeed's files name at ZeRO-1 and 2 beside tensors (0.19.8): values, which do nothing
when they are made
"""


def code_in(folder: Path) -> str | None:
    """What a file of this checkpoint wants called when it is read, or that it cannot be told; None
    when all hold data.
    """
    for file in sorted(folder.rglob("*.pt")):
        name = file.relative_to(folder).as_posix()
        try:
            named = sorted(set(get_unsafe_globals_in_checkpoint(file)) - set(DEEPSPEED))
        except (ValueError, RuntimeError, UnpicklingError) as error:
            return (
                f"{name} cannot be read as data:"
                f" {(str(error).splitlines() or [type(error).__name__])[0]}"
            )
        if named:
            return f"{name} calls {', '.join(named)}"
    return None


def load_data(path: str | Path, map_location: Any = None) -> Any:
    """As torch.load, for DeepSpeed's files.

    Raises:
        UnpicklingError: what they name is neither torch's nor in `DEEPSPEED`.
    """
    with safe_globals([_imported(name) for name in DEEPSPEED]):
        return torch.load(path, map_location=map_location, weights_only=True)


def _imported(name: str) -> Any:
    module, _, own = name.rpartition(".")
    return getattr(importlib.import_module(module), own)
