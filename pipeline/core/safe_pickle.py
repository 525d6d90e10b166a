"""Reads checkpoint files of torch.save as data only: they are pickles, and a pickle can run code.

Checksums do not protect: whoever can change a checkpoint can also write its manifest. The names in
a file are therefore checked before it is loaded, and it is loaded with `weights_only`, which calls
only listed names (torch 2.13).
"""

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
"""names in DeepSpeed's files at ZeRO-1 and 2 beside tensors (0.19.8); making these values has no
side effect
"""


def find_code(folder: Path) -> str | None:
    """The first file of a checkpoint that would call code, or cannot be checked, as a sentence.

    None if all files hold data only.
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
    """`torch.load` for DeepSpeed's files.

    Raises:
        UnpicklingError: a name in the file is neither torch's nor in `DEEPSPEED`.
    """
    with safe_globals([_imported(name) for name in DEEPSPEED]):
        return torch.load(path, map_location=map_location, weights_only=True)


def _imported(name: str) -> Any:
    module, _, own = name.rpartition(".")
    return getattr(importlib.import_module(module), own)
