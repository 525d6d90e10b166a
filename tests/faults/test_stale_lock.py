"""Locks that a killed build of DeepSpeed's extensions left, for which torch waits without an end: nobody here asks for one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.backend.deepspeed import DeepSpeed, import_deepspeed
from tests.processes import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]


def test_training_waits_for_no_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    assert run_ranks(trained, 1, tmp_path) == [True]


def trained(rank: int, ranks: int) -> bool:
    import_deepspeed()
    from deepspeed.ops import __compatible_ops__ as extensions

    root = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    assert "deepspeed_shm_comm" in extensions and len(extensions) > 5
    for name in extensions:
        (root / name).mkdir(parents=True)
        (root / name / "lock").touch()
    for zero in (0, 1):
        network = nn.Linear(2, 2)
        backend = DeepSpeed(network, lambda net: torch.optim.AdamW(net.parameters(), lr=0.1), micro_batch=1, zero=zero)
        before = network.weight.detach().clone()
        backend.backward(backend.model(torch.ones(1, 2)).sum(), 1.0)
        backend.step()
        assert not torch.equal(network.weight, before)
    return all([file.name for file in folder.iterdir()] == ["lock"] for folder in root.iterdir())
