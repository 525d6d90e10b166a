"""Weights of two commits are the same to the bit, or the tool says where they differ."""

import hashlib
import importlib.util
from importlib.machinery import SourceFileLoader
from typing import Any

import numpy as np
import pytest

LOADER = SourceFileLoader("same_bits", "tools/same_bits")  # no name that ends in .py
same_bits: Any = importlib.util.module_from_spec(
    importlib.util.spec_from_loader(LOADER.name, LOADER)
)
LOADER.exec_module(same_bits)


def tensor(*values: float, dtype: str = "float32") -> dict[str, Any]:
    array = np.array(values, dtype)
    found = {"shape": list(array.shape), "dtype": dtype, "values": array.tolist()}
    return {**found, "sha256": hashlib.sha256(array.tobytes()).hexdigest()}


BEFORE = {"weight": tensor(1.0, 2.0), "bias": tensor(0.5), "mean": tensor(0.0, 0.0)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        (
            {"weight": tensor(1.0, 2.25)},
            "1 of 3 tensors differ, by up to 0.25 in weight (of its sampled values)",
        ),
        (
            {"weight": tensor(1.0, 2.25), "bias": tensor(1.5)},
            "2 of 3 tensors differ, by up to 1 in bias",
        ),
        ({"mean": tensor(0.0, -0.0)}, "1 of 3 tensors differ, by up to 0 in mean"),
        ({"bias": tensor(0.5, dtype="float64")}, "1 of 3 tensors differ, by up to 0 in bias"),
        ({"weight": tensor(1.0, 2.0, 3.0)}, "1 of 3 tensors differ, by up to inf in weight"),
        (
            {"extra": tensor(1.0)},
            "0 tensors before and 1 after have no match; parameter names differ too",
        ),
    ],
)
def test_a_difference_is_named_with_its_size(changes: dict[str, Any], said: str | None) -> None:
    found = same_bits.difference(BEFORE, BEFORE | changes)
    assert found is None if said is None else found.startswith(said)


def test_renamed_parameters_are_compared_by_their_bytes() -> None:
    renamed = {f"network.{name}": each for name, each in BEFORE.items()}
    assert same_bits.difference(BEFORE, renamed) is None
    changed = renamed | {"network.bias": tensor(0.75)}
    assert same_bits.difference(BEFORE, changed).startswith(
        "1 tensors before and 1 after have no match"
    )


def test_a_run_of_one_commit_alone_is_a_difference() -> None:
    assert list(same_bits.differences({"one": BEFORE}, {"one": BEFORE})) == []
    found = list(
        same_bits.differences({"one": BEFORE, "old": BEFORE}, {"one": BEFORE, "new": BEFORE})
    )
    assert found == ["new: trained only after", "old: trained only before"]
