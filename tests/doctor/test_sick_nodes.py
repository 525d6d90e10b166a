"""A node that raises, that hangs, or that is not what it should be is told in a line, and the others are told all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.doctor import node, visit
from pipeline.doctor.node import Asked, examine
from pipeline.doctor.stranger import Stranger
from pipeline.launch.base import LaunchError, Silent
from pipeline.marker import Marker
from tests.doctor.test_findings import NODE
from tests.nodes import TOKEN, nodes

SCRIPT = """
import sys, time
from pathlib import Path
from pipeline.launch import nodes
from pipeline.launch.ray import Ray

def is_first(file):
    try:
        Path(file).touch(exist_ok=False)
        return True
    except FileExistsError:
        return False

def raises(file):
    if is_first(file):
        raise RuntimeError("two lines\\nCUDA error: unspecified launch failure")
    return "well"

def hangs(file):
    time.sleep(600 if is_first(file) else 0)
    return "well"

def no_clock():
    raise OSError("no clock")

folder = sys.argv[2]
with Ray(workers=0, address=sys.argv[1]) as cluster:
    print(sorted(map(repr, cluster.nodes.on_each(raises, folder + "/raises", within_s=60))))
    print(sorted(map(repr, cluster.nodes.on_each(hangs, folder + "/hangs", within_s=6))))
    print([type(each).__name__ for each in cluster.nodes.clocks(within_s=60).values()])
    nodes._now = no_clock
    print(list(cluster.nodes.clocks(within_s=60).values()))
"""


@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_one_of_two_raises_and_hangs(tmp_path: Path) -> None:
    with nodes({}) as cluster:
        cluster.add()
        words = [sys.executable, "-c", SCRIPT, cluster.address, str(tmp_path)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=200, env={**os.environ, **TOKEN})
    assert done.returncode == 0, done.stderr[-3000:]
    raised, hung, clocks, none = done.stdout.strip().splitlines()
    assert raised.startswith('["\'well\'", "Silent(address=') and "why='RuntimeError: CUDA error: unspecified launch" in raised
    assert hung.startswith('["\'well\'", "Silent(address=') and "why='it does not answer in time'" in hung
    assert clocks == "['tuple']" and "why='OSError: no clock'" in none  # both nodes have this machine's address


class Sick:
    """A cluster of two nodes, of which one cannot be asked anything."""

    silent = Silent("10.0.0.2", "ModuleNotFoundError: No module named 'pipeline'")

    @property
    def nodes(self) -> Sick:
        return self

    def on_each(self, work: Any, given: Asked, *, within_s: float) -> list[Any]:
        return [NODE, self.silent]

    def clocks(self, *, within_s: float) -> dict[str, Any]:
        return {"10.0.0.1": (0.0, 0.01), "10.0.0.2": self.silent}

    def at_once(self, *given: Any, within_s: float) -> list[float]:
        raise LaunchError("GetTimeoutError: not in time")

    def found_at(self) -> str:
        return "10.0.0.1:6379"


def test_the_doctor_tells_of_the_others_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def cluster(**given: Any) -> Iterator[Sick]:
        yield Sick()

    monkeypatch.setattr(visit, "Ray", cluster)
    monkeypatch.setattr(visit, "stranger", lambda address: Stranger(outcome="refused"))
    found = visit.visit(tmp_path, address="auto", checkpoint_bytes=0, keep=1)
    bad = {each.check: each.told for each in found if each.state == "bad"}
    assert bad["node"] == "10.0.0.2 cannot be examined: ModuleNotFoundError: No module named 'pipeline'"
    assert bad.keys() == {"node", "clock", "network"}
    assert {"versions", "storage", "ops", "auth"} <= {each.check for each in found if each.state == "ok"}


def test_a_card_that_fails_is_told_beside_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(index: int) -> str:
        if index:
            raise RuntimeError("CUDA error:\nunspecified launch failure")
        return "H100"

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", name)
    assert node._gpus() == ("H100", "failed: RuntimeError: CUDA error: unspecified launch failure")


def test_a_lock_that_goes_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("gone", "kept"):
        (tmp_path / name).mkdir()
    (tmp_path / "gone" / "lock").symlink_to("nowhere")  # found, and not there when it is asked for its age
    (tmp_path / "kept" / "lock").touch()
    assert list(node.compilation_locks()) == [str(tmp_path / "kept" / "lock")]


def test_a_folder_of_runs_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_ffcv", "_threading_layer"):
        monkeypatch.setattr(node, name, lambda: "ok")
    found = examine(Asked(runs=str(tmp_path / "gone"), marker=Marker("x", "y")))
    assert (found.sees_runs, found.free_bytes, found.written_bytes_per_s) == (False, None, None)
