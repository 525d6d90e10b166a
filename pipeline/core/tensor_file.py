"""Tensor files, read as data only: named tensors of other programs, and checkpoints.

Files of torch.save are pickles, and a pickle can run code. Checksums do not protect: an attacker
who can change a checkpoint can also write its manifest. The functions and classes that a checkpoint
calls are therefore checked before loading. Loading uses `weights_only`, which calls only listed
functions and classes (torch 2.13).
"""

import argparse
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from pipeline.core.checks import require


def read_state(file: Path, *, subject: str) -> Mapping[str, Tensor]:
    """Read the `state_dict` in a .safetensors file, or in a file of torch.save.

    In a file of torch.save the state may be the value of `state_dict`, `model`, `module` or `net`,
    beside plain values and the arguments of the program that wrote the file. No code of the file is
    run.

    Raises:
        ValueError: the file does not exist, cannot be read, or contains something other than named
            tensors. The message begins with `subject`.
    """
    require(file.is_file(), f"{subject}: {file} must be a file of weights; it does not exist")
    try:
        # Published QKFormer files contain the program's arguments.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state: Any = (
                load_file(file)
                if file.suffix == ".safetensors"
                else torch.load(file, map_location="cpu", weights_only=True)
            )
    except Exception as error:  # torch and safetensors do not document their errors
        raise ValueError(
            f"{subject}: {file} must hold weights; it could not be read: {_first_line(error)}"
        ) from error
    for wrapper in ("state_dict", "model", "module", "net"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    require(
        isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values()),
        f"{subject}: {file} must hold named tensors; it holds something else",
    )
    return state


def describe_mismatch(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, max_names: int = 3
) -> str:
    """Describe differing names and shapes, up to `max_names` of each kind; empty if none differ."""
    kinds = {
        "missing": [key for key in expected if key not in actual],
        "unknown": [key for key in actual if key not in expected],
        "of another shape": [
            f"{key} ({list(actual[key].shape)} instead of {list(expected[key].shape)})"
            for key in expected
            if key in actual and actual[key].shape != expected[key].shape
        ],
    }
    return "; ".join(
        f"{len(keys)} {kind}: {', '.join(keys[:max_names])}"
        f"{', ...' if len(keys) > max_names else ''}"
        for kind, keys in kinds.items()
        if keys
    )


# Classes of DeepSpeed 0.19.8 that its files at ZeRO-1 and 2 contain, besides torch's. Creating
# their objects has no side effect.
DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def find_code(folder: Path) -> str | None:
    """Describe the first file of a checkpoint that would run code or cannot be checked.

    Returns None if all .pt files contain only data. Other files are not checked.
    """
    for file in sorted(folder.rglob("*.pt")):
        name = file.relative_to(folder).as_posix()
        try:
            callables = sorted(set(get_unsafe_globals_in_checkpoint(file)) - set(DEEPSPEED_CLASSES))
        except (ValueError, RuntimeError, UnpicklingError) as error:
            return f"{name} cannot be read as data: {_first_line(error)}"
        if callables:
            return f"{name} calls {', '.join(callables)}"
    return None


def load_deepspeed(path: str | Path, map_location: Any = None) -> Any:
    """`torch.load` for DeepSpeed's files.

    Raises:
        UnpicklingError: the file contains a name that is neither torch's nor in
            `DEEPSPEED_CLASSES`.
    """
    with safe_globals(list(map(pkgutil.resolve_name, DEEPSPEED_CLASSES))):
        return torch.load(path, map_location=map_location, weights_only=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
