"""Named tensors of foreign files, and how two sets of them differ. What cannot be read: tests/teachers/test_weights.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.state_file import misfits, read_state

STATE = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "module"])
def test_both_formats_are_read_bare_or_wrapped(tmp_path: Path, wrapper: str | None) -> None:
    save_file(STATE, tmp_path / "state.safetensors")
    torch.save(STATE if wrapper is None else {wrapper: STATE, "epoch": 1}, tmp_path / "state.pt")
    for file in ("state.safetensors", "state.pt"):
        found = read_state(tmp_path / file, who="test")
        assert found.keys() == STATE.keys() and all(torch.equal(found[key], STATE[key]) for key in STATE)


def test_what_does_not_fit_is_named_by_kind() -> None:
    assert misfits(STATE, STATE) == ""
    found = {"b": torch.ones(3), "c": STATE["a"], **{f"d{i}": STATE["a"] for i in range(3)}}
    assert misfits(found, STATE) == "1 missing: a; 4 unknown: c, d0, d1, ...; 1 of another shape: b ([3] instead of [2, 2])"
