"""Tests see no GPU, unless `-m gpu` asks for them."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

FILE = Path(__file__).with_name("conftest.py")


def read_anew() -> ModuleType:
    found = importlib.util.spec_from_file_location("conftest_read_anew", FILE)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("asked", "seen"),
    [
        ("gpu", ("0,1", None)),
        ("", ("", "cpu")),
        ("not full and not distributed", ("", "cpu")),
        ("not gpu", ("", "cpu")),
    ],
)
def test_cards_are_hidden_unless_they_are_asked_for(
    asked: str, seen: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"CUDA_VISIBLE_DEVICES": "0,1"})
    module = read_anew()
    assert (
        os.environ["CUDA_VISIBLE_DEVICES"] == ""
    )  # while test files are not read yet, whatever is asked for
    module.pytest_configure(SimpleNamespace(getoption={"markexpr": asked}.get))
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ.get("DS_ACCELERATOR")) == seen


def test_this_test_sees_none() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and torch.cuda.device_count() == 0
