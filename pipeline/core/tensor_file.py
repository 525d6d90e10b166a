"""Named tensors from files of other programs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def read_state(file: Path, *, who: str) -> Mapping[str, Tensor]:
    """Read the `state_dict` in a .safetensors file, or in a file of torch.save.

    In the latter it may stand under `state_dict`, `model` or `module`, beside plain values and the
    arguments of the program that wrote it. No code of the file is run.

    Raises:
        ValueError: the file does not exist, cannot be read, or holds no named tensors. The message
            begins with `who`.
    """
    if not file.is_file():
        raise ValueError(f"{who}: {file} must be a file of weights; it does not exist")
    try:
        # Published QKFormers were saved with their arguments.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = (
                load_file(file)
                if file.suffix == ".safetensors"
                else torch.load(file, map_location="cpu", weights_only=True)
            )
    except Exception as error:  # torch and safetensors do not say which errors a file may raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{who}: {file} must hold weights; it could not be read: {first}"
        ) from error
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise ValueError(f"{who}: {file} must hold named tensors; it holds something else")
    return state


def describe_mismatch(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, most: int = 3
) -> str:
    """How two states differ in names and shapes, up to `most` of each kind; empty if they agree."""
    kinds = {
        "missing": [key for key in expected if key not in found],
        "unknown": [key for key in found if key not in expected],
        "of another shape": [
            f"{key} ({list(found[key].shape)} instead of {list(expected[key].shape)})"
            for key in expected
            if key in found and found[key].shape != expected[key].shape
        ],
    }
    return "; ".join(
        f"{len(keys)} {kind}: {', '.join(keys[:most])}{', ...' if len(keys) > most else ''}"
        for kind, keys in kinds.items()
        if keys
    )
