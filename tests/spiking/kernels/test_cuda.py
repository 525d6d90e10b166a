"""The Triton kernels of neurons: in Triton's interpreter against eager torch, and compiled for an
H100 without one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(part, marks=pytest.mark.full) for part in range(1, 6))]
)
def test_in_the_interpreter_spikes_have_eagers_bits(part: int):
    words = [sys.executable, "-m", "tests.helpers.triton_cases", str(part), "6"]
    ran = subprocess.run(
        words, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert ran.returncode == 0 and int(ran.stdout.split()[0]) > 100, ran.stderr[-2000:]


def test_compiled_for_an_h100_all_values_are_in_registers(tmp_path: Path):
    words = [sys.executable, "-m", "tests.helpers.triton_compiled"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    lines = ran.stdout.splitlines()
    assert len(lines) == 18
    for line in lines:
        registers, stack, local = map(int, line.split(": ")[1].split())
        assert registers <= 128 and stack == local == 0, line
