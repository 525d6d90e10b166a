"""The Triton kernels of neurons: in Triton's interpreter against eager torch, and compiled for an
H100 without one.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from pipeline.spiking.kernels import operators


@pytest.mark.parametrize(
    ("part", "parts"),
    [(0, 48), *(pytest.param(part, 12, marks=pytest.mark.full) for part in range(12))],
)
def test_in_the_interpreter_spikes_have_eagers_bits(part: int, parts: int):
    words = [sys.executable, "-m", "tests.helpers.triton_cases", str(part), str(parts)]
    ran = subprocess.run(
        words, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert ran.returncode == 0 and int(ran.stdout.split()[0]) > 50, ran.stderr[-2000:]


@pytest.mark.full
def test_compiled_for_an_h100_all_values_are_in_registers(tmp_path: Path):
    words = [sys.executable, "-m", "tests.helpers.triton_compiled"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    names, numbers = zip(*(line.split(": ") for line in ran.stdout.splitlines()), strict=True)
    assert len(names) > 70 and len(set(names)) == 9
    for name, (registers, stack, local) in zip(names, map(str.split, numbers), strict=True):
        assert int(registers) <= 128 and stack == local == "0", name


def test_a_launch_has_the_gpu_of_its_tensors_as_the_current_one(monkeypatch: pytest.MonkeyPatch):
    """Triton launches on the current GPU, wherever the tensors are."""
    current, x = [0], Mock(spec=torch.Tensor, is_cuda=True, get_device=lambda: 1)

    def exchange(index: int) -> int:
        before, current[0] = current[0], index
        return before

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    kernels = SimpleNamespace(lif_backward=lambda *args: (current[0], args))
    monkeypatch.setattr(operators, "_import", lambda module: kernels)
    assert operators._function("lif_backward", "cuda")(None, x) == (1, (None, x))
    assert current == [0]
