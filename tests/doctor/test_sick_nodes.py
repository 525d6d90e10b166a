"""A node that raises, that hangs, or that is not what it should be is told in a line, and the others are told all the same."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from pipeline.doctor import node, visit
from pipeline.doctor.node import Asked, examine
from pipeline.doctor.run_lock import tried
from pipeline.doctor.stranger import Stranger
from pipeline.launch.base import LaunchError, Silent
from pipeline.marker import Marker
from pipeline.measure.driver import Unusable
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

def cores(count):
    return count

def no_clock():
    raise OSError("no clock")

folder = sys.argv[2]
with Ray(workers=0, address=sys.argv[1]) as cluster:
    print(sorted(map(repr, cluster.nodes.on_each(raises, lambda has: folder + "/raises", within_s=60))))
    print(sorted(map(repr, cluster.nodes.on_each(hangs, lambda has: folder + "/hangs", within_s=6))))
    print(cluster.nodes.on_each(cores, lambda has: has["CPU"], within_s=60))
    print([type(each).__name__ for each in cluster.nodes.clocks(within_s=60).values()])
    nodes._now = no_clock
    print(list(cluster.nodes.clocks(within_s=60).values()))
"""


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_one_of_two_raises_and_hangs(tmp_path: Path) -> None:
    with nodes({}) as cluster:
        cluster.add()
        words = [sys.executable, "-c", SCRIPT, cluster.address, str(tmp_path)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=200, env={**os.environ, **TOKEN})
    assert done.returncode == 0, done.stderr[-3000:]
    raised, hung, cores, clocks, none = done.stdout.strip().splitlines()
    assert raised.startswith('["\'well\'", "Silent(address=') and "why='RuntimeError: CUDA error: unspecified launch" in raised
    assert hung.startswith('["\'well\'", "Silent(address=') and "why='it does not answer in time'" in hung
    assert cores == "[1.0, 1.0]"
    assert clocks == "['tuple']" and "why='OSError: no clock'" in none  # both nodes have this machine's address


class Sick:
    """A cluster of two nodes, of which one cannot be asked anything."""

    silent = Silent("10.0.0.2", "ModuleNotFoundError: No module named 'pipeline'")

    @property
    def nodes(self) -> Sick:
        return self

    def on_each(self, work: Any, given: Any, *, within_s: float) -> list[Any]:
        """The one that answers is this process; of an examination it has only tried the lock."""
        asked = given({"CPU": 4.0, "GPU": 2.0})
        if work is examine:
            assert asked.resources == {"CPU": 4.0, "GPU": 2.0}
            return [replace(NODE, run_lock=tried(Path(asked.runs) / asked.marker.name)), self.silent]
        return [work(asked), self.silent]

    def clocks(self, *, within_s: float) -> dict[str, Any]:
        return {"10.0.0.1": (0.0, 0.01), "10.0.0.2": self.silent}

    def at_once(self, *given: Any, within_s: float) -> list[float]:
        raise LaunchError("GetTimeoutError: not in time")

    def found_at(self) -> str:
        return "10.0.0.1:6379"


@pytest.fixture
def sick(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def cluster(**given: Any) -> Iterator[Sick]:
        yield Sick()

    monkeypatch.setattr(visit, "Ray", cluster)
    monkeypatch.setattr(visit, "stranger", lambda address: Stranger(outcome="refused"))


@pytest.mark.usefixtures("sick")
def test_the_doctor_tells_of_the_others_all_the_same(tmp_path: Path) -> None:
    """And holds a lock meanwhile, as a driver does: `storage` would be bad without."""
    found = visit.visit(tmp_path, address="auto", checkpoint_bytes=0, keep=1)
    bad = {each.check: each.told for each in found if each.state == "bad"}
    assert bad["node"] == "10.0.0.2 cannot be examined: ModuleNotFoundError: No module named 'pipeline'"
    assert bad.keys() == {"node", "clock", "network"}
    assert {"versions", "storage", "ops", "auth"} <= {each.check for each in found if each.state == "ok"}


def test_local_is_this_machine_and_starts_no_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visit, "Ray", lambda **given: pytest.fail(f"a Ray at {given['address']!r}"))
    monkeypatch.setattr(visit, "examine", lambda asked: NODE)
    told = [visit.visit(tmp_path, address=address, checkpoint_bytes=0, keep=1) for address in (None, "local")]
    assert told[0] == told[1] and not {"auth", "clock"} & {each.check for each in told[1]}


@pytest.mark.usefixtures("sick")
@pytest.mark.parametrize(("size", "state"), [(1.0, "ok"), (1e18, "bad")])
def test_the_doctor_tries_where_checkpoints_are_kept(tmp_path: Path, size: float, state: str) -> None:
    """On each node; room is looked for there, and not where the runs are."""
    runs, place = tmp_path / "runs", str(tmp_path / "kept")
    found = visit.visit(runs, address="auto", checkpoints=place, checkpoint_bytes=size, keep=1)
    with_runs, kept, silent = [each for each in found if each.check == "storage"]
    assert with_runs.state == "ok" and str(runs) in with_runs.told
    assert kept.state == state and f"what was put at {place} was found" in kept.told
    assert silent.state == "bad" and silent.told.startswith(f"10.0.0.2: whether {place} keeps checkpoints could not be tried")
    assert list((tmp_path / "kept").iterdir()) == []


@pytest.mark.usefixtures("sick")
def test_a_driver_that_cannot_keep_checkpoints_is_told_beside_the_nodes(tmp_path: Path) -> None:
    found = visit.visit(tmp_path, address="auto", checkpoints="nosuch://x", checkpoint_bytes=0, keep=1)
    told = [each.told for each in found if each.check == "storage" and each.state == "bad"]
    assert told[0].startswith("this machine: nosuch://x cannot be opened: ValueError: Protocol not known") and len(told) == 3


@pytest.mark.parametrize(
    ("place", "counts"), [(None, (4, 0)), ("/shared/kept", (0, 4)), ("file:///shared/kept", (0, 4)), ("s3://bucket", (2, 0))]
)
def test_room_is_wanted_where_checkpoints_lie(place: str | None, counts: tuple[int, int]) -> None:
    """Beside the three that are kept the one being written; a store has them pass through the run, one each way."""
    assert visit._counts(place, 3) == counts


@pytest.mark.parametrize(
    ("resources", "visible", "promised", "trains"),
    [
        (None, None, 2, True),
        (None, "0", 0, True),
        ({"CPU": 4.0, "GPU": 8.0}, "0", 8, True),
        ({"CPU": 4.0}, None, 0, True),
        ({"memory": 1.0}, None, 0, False),
    ],
)
def test_the_cards_that_are_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resources: Any, visible: str | None, promised: int, trains: bool
) -> None:
    """Ray's word counts, where there is a Ray; of files of the driver's those of cards."""
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    for name in ("_ffcv", "_threading_layer"):
        monkeypatch.setattr(node, name, lambda: "ok")
    monkeypatch.setattr(node, "_off", lambda device: {})
    monkeypatch.setattr(node, "cards", lambda: ())
    monkeypatch.setattr(node, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = examine(Asked(runs=str(tmp_path), marker=Marker("x", "y"), resources=resources))
    assert (found.promised_gpus, found.trains) == (promised, trains)


def test_cards_that_torch_cannot_use_are_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts them by NVML, so that each would be tried in vain."""
    for name in ("_ffcv", "_threading_layer"):
        monkeypatch.setattr(node, name, lambda: "ok")
    unusable = Unusable("torch is built for CUDA 13.0 and cannot use the 8 GPUs here", "install driver 580 or newer")
    monkeypatch.setattr(node, "unusable_cards", lambda: unusable)
    monkeypatch.setattr(node, "cards", lambda: pytest.fail("tried"))
    found = examine(Asked(runs=str(tmp_path), marker=Marker("x", "y"), resources={"CPU": 64.0, "GPU": 8.0}))
    assert (found.unusable, found.gpus, found.device) == (unusable, (), "cpu")


def test_a_node_without_tbb(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba takes the next layer without a word; more than one loader thread is refused all the same."""
    monkeypatch.setitem(sys.modules, "numba.np.ufunc.tbbpool", None)
    monkeypatch.setattr(sys, "prefix", "/nowhere")
    assert node._threading_layer().startswith("failed: DataError: data: more than 1 loader thread needs TBB")


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
    assert not found.sees_runs
    for each in (found.run_lock, found.free_bytes, found.written_bytes_per_s):
        assert isinstance(each, str) and each.startswith("failed: FileNotFoundError")


def test_a_disk_that_takes_no_more_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.tempfile, "TemporaryFile", lambda **given: FileIO("/dev/full", "w"))
    assert node._speed(tmp_path) == "failed: OSError: [Errno 28] No space left on device"


def test_a_disk_with_no_room_for_a_marker_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    (found,) = visit.visit(tmp_path, address=None, checkpoint_bytes=0, keep=1)
    said = f"this machine cannot put a file into {tmp_path}: OSError: [Errno 28] No space left on device"
    assert (found.check, found.state) == ("storage", "bad") and found.told.startswith(said) and "make room" in found.advice
