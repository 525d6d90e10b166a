"""Named tensors from a file that somebody else wrote."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def read_state(file: Path, *, who: str) -> Mapping[str, Tensor]:
    """The `state_dict` in a .safetensors file, or in one of torch.save, bare or under one of its
    usual names.

    No code of the file is run. Beside tensors and plain values it may hold the arguments of the
    program that wrote it.

    Raises: ValueError, in the name of `who` asks, for a file that is not there, cannot be read, or
    holds something else."""
    if not file.is_file():
        raise ValueError(f"{who}: {file} must be a file of weights; it does not exist")
    try:
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # as published QKFormers were saved; a bag of names
            state = (
                load_file(file)
                if file.suffix == ".safetensors"
                else torch.load(file, map_location="cpu", weights_only=True)
            )
    except (
        Exception
    ) as error:  # what a foreign file makes torch and safetensors raise is theirs to choose
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{who}: {file} must hold weights; it could not be read: {said}"
        ) from error
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise ValueError(f"{who}: {file} must hold named tensors; it holds something else")
    return state


def misfits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, most: int = 3) -> str:
    """In what two states differ by name or shape, the first few of each kind; empty where nothing
    does.
    """
    kinds = {
        "missing": [key for key in expected if key not in found],
        "unknown": [key for key in found if key not in expected],
        "of another shape": [
            f"{key} ({list(found[key].shape)} instead of {list(expected[key].shape)})"
            for key in expected
            if key in found and found[key].shape != expected[key].shape
        ],
    }
    told = []
    for kind, keys in kinds.items():
        if keys:
            told.append(
                f"{len(keys)} {kind}: {', '.join(keys[:most])}{', ...' if len(keys) > most else ''}"
            )
    return "; ".join(told)
