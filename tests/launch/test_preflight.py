"""`spiketrain doctor`: each check finds what it is about, and one sick node hides no other."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from pipeline.cli.doctor import doctor
from pipeline.core.shared_marker import Marker
from pipeline.launch import preflight as module
from pipeline.launch.base import LaunchError, NoAnswer
from pipeline.launch.preflight import (
    MEETING_S,
    PACKAGES,
    Finding,
    Meeting,
    NodeReport,
    Store,
    compare,
    examine,
    meet,
    preflight,
)
from pipeline.launch.ray_cluster import free_port
from pipeline.measure.driver import UnusableGPUs
from tests.helpers.nodes import TOKEN, nodes

ONE = NodeReport("one", {"python": "3.11.7", **dict.fromkeys(PACKAGES, "1.0")})
TWO = replace(ONE, name="two")
SCRIPT = """
import sys, time
from pathlib import Path
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

folder = sys.argv[2]
with Ray(workers=0, address=sys.argv[1]) as cluster:
    on_each = cluster.nodes.run_on_each
    print(sorted(map(repr, on_each(raises, lambda has: folder + "/r", within_s=60))))
    print(sorted(map(repr, on_each(hangs, lambda has: folder + "/h", within_s=6))))
    print(on_each(cores, lambda has: has["CPU"], within_s=60))
"""


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_one_of_two_nodes_raises_and_hangs(tmp_path: Path) -> None:
    with nodes({}) as cluster:
        cluster.add()
        words = [sys.executable, "-c", SCRIPT, cluster.address, str(tmp_path)]
        given = {"capture_output": True, "text": True, "env": {**os.environ, **TOKEN}}
        done = subprocess.run(words, timeout=200, **given)
    assert done.returncode == 0, done.stderr[-3000:]
    raised, hung, cores = done.stdout.strip().splitlines()
    silent = '["\'well\'", "NoAnswer(address='
    assert raised.startswith(silent) and "why='RuntimeError: CUDA error: unspecified" in raised
    assert hung.startswith(silent) and "why='it does not answer in time'" in hung
    assert cores == "[1.0, 1.0]"


# ----------------------------------------------------------------------------- a whole preflight


@pytest.fixture
def no_ffcv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes seconds."""
    monkeypatch.setattr(module, "_reading", lambda: [Finding("ffcv", "ok", "read")])


class Sick:
    """A cluster of two nodes: one is this process, and one does not answer."""

    silent = NoAnswer("10.0.0.2", "ModuleNotFoundError: No module named 'pipeline'")

    @property
    def nodes(self) -> Sick:
        return self

    def run_on_each(self, work: Any, given: Any, *, within_s: float) -> list[Any]:
        return [work(given({"CPU": 4.0})), self.silent]

    def run_together(self, *given: Any, within_s: float) -> list[None]:
        raise LaunchError("GetTimeoutError: not in time")

    def address_for_others(self) -> str:
        return "10.0.0.1:6379"


@pytest.fixture
def sick(monkeypatch: pytest.MonkeyPatch, no_ffcv: None) -> None:
    @contextmanager
    def cluster(**given: Any) -> Iterator[Sick]:
        yield Sick()

    monkeypatch.setattr(module, "Ray", cluster)
    monkeypatch.setattr(module, "of_token", lambda address: Finding("auth", "ok", address))


def run(runs: Path, address: str | None = "auto", at: str | None = None) -> Any:
    return preflight(runs, address=address, checkpoints=at)


@pytest.mark.usefixtures("sick")
def test_a_node_that_does_not_answer_hides_no_other(tmp_path: Path) -> None:
    """The driver holds a lock meanwhile; without it `storage` would be bad."""
    found = run(tmp_path)
    bad = {each.check: each.text for each in found if each.state == "bad"}
    said = "10.0.0.2 cannot be examined: ModuleNotFoundError: No module named 'pipeline'"
    assert bad["node"] == said and bad["network"].endswith("GetTimeoutError: not in time")
    assert bad.keys() == {"node", "network"}
    ok = {each.check for each in found if each.state == "ok"}
    assert {"versions", "gpus", "ffcv", "storage", "auth", "mlflow"} <= ok
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_ffcv")
def test_local_is_this_machine_and_starts_no_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Ray", lambda **given: pytest.fail(f"a Ray at {given['address']}"))
    for address in (None, "local"):
        checks = [each.check for each in run(tmp_path, address)]
        assert checks == ["versions", "gpus", "ffcv", "storage", "mlflow"]


@pytest.mark.usefixtures("sick")
def test_each_node_tries_where_checkpoints_are_kept(tmp_path: Path) -> None:
    runs, place = tmp_path / "runs", tmp_path / "kept"
    found = [each for each in run(runs, at=str(place)) if each.check == "storage"]
    assert [each.state for each in found] == ["ok", "ok", "bad"]
    assert f"written to {runs}" in found[0].text and f"written to {place}" in found[1].text
    assert found[2].text.startswith("10.0.0.2 ") and list(place.iterdir()) == []


@pytest.mark.usefixtures("sick")
def test_a_driver_that_cannot_write_checkpoints_is_reported_beside_the_nodes(
    tmp_path: Path,
) -> None:
    found = [each.text for each in run(tmp_path, at="nosuch://x") if each.state == "bad"]
    said = "nosuch://x cannot be opened: ValueError: Protocol not known"
    assert sum(said in each for each in found) == 2
    assert any(each.startswith(f"this machine: {said}") for each in found)


@pytest.mark.parametrize("address", ["s3://AKIA:planted@bucket/p", "s3://bucket/p?key=planted"])
def test_an_address_with_credentials_is_refused_first(address: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no credentials") as refused:
        doctor(runs=tmp_path / "runs", checkpoints=address)
    assert "planted" not in str(refused.value) and not (tmp_path / "runs").exists()


def test_a_full_disk_is_reported_with_what_to_do(tmp_path: Path) -> None:
    """A disk with no room even for a marker: /dev/full takes every name and no content."""
    (tmp_path / "runs").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fsspec.implementations.local.LocalFileSystem.pipe_file", _full)
        (found,) = run(tmp_path / "runs")
    said = f"this machine: {tmp_path / 'runs'} cannot be written to: OSError: [Errno 28] No space"
    assert (found.check, found.state) == ("storage", "bad") and found.text.startswith(said)
    assert "make room" in found.advice


def _full(*given: Any, **more: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ------------------------------------------------------------------------------ nodes are compared


def of(*reports: NodeReport) -> list[Finding]:
    return [each for each in compare(reports) if each.state != "ok"]


def test_nodes_that_are_alike() -> None:
    both, alone = (next(compare(reports)).text for reports in ([ONE, TWO], [ONE]))
    assert both == f"{alone}, the same on 2 nodes" and of(ONE, TWO) == of(ONE) == of() == []


@pytest.mark.parametrize(
    ("other", "state", "text"),
    [
        ({"versions": {**ONE.versions, "torch": "2.0"}}, "bad", "torch: one has 1.0, two has 2.0"),
        ({"gpus": ("A100",)}, "warn", "one: H100; two: A100"),
        ({}, "warn", "one: H100; two: no GPU"),  # its driver may have been gone as Ray counted
    ],
)
def test_a_node_that_differs(other: dict[str, Any], state: str, text: str) -> None:
    one = ONE if "versions" in other else replace(ONE, gpus=("H100",))
    (found,) = of(one, replace(TWO, **other))
    assert (found.state, found.text) == (state, text) and found.advice


def test_what_is_installed_nowhere() -> None:
    (found,) = of(replace(ONE, versions={**ONE.versions, "ffcv": "not installed"}))
    assert (found.state, found.text) == ("bad", "ffcv is not installed")


def test_a_head_without_workers_and_a_node_with_a_bad_gpu_are_not_compared() -> None:
    with_gpu = replace(ONE, gpus=("H100",))
    assert of(with_gpu, replace(TWO, trains=False)) == []
    assert of(with_gpu, replace(TWO, findings=(Finding("gpus", "bad", "x"),))) == []


# ------------------------------------------------------------------------------------ on one node


@pytest.fixture
def driver(tmp_path: Path, no_ffcv: None) -> Iterator[Store]:
    """The folder of runs, with the driver's marker in it, which is locked."""
    (tmp_path / "marker").write_text("content")
    with module._locked(tmp_path / "marker"):
        yield Store(str(tmp_path), Marker("marker", "content"))


def bad_of(store: Store, resources: dict[str, float] | None = None) -> list[Finding]:
    return [each for each in examine(store, resources).findings if each.state != "ok"]


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
def test_gpus_that_are_missing(
    driver: Store,
    monkeypatch: pytest.MonkeyPatch,
    resources: Any,
    visible: str | None,
    promised: int,
    trains: bool,
) -> None:
    """Ray's count holds where there is a Ray, else the number of the driver's files of GPUs."""
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (Path(driver.address) / name).touch()
    monkeypatch.setattr(module, "DEVICES", Path(driver.address))
    monkeypatch.setattr(module, "unusable_gpus", lambda: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    report = examine(driver, resources)
    texts = [each.text.split(": ")[1] for each in report.findings if each.check == "gpus"]
    assert texts == ([f"torch finds 0 of {promised} GPUs"] if promised else [])
    assert report.trains == trains


def test_gpus_that_torch_cannot_use_are_reported_once(
    driver: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    unusable = UnusableGPUs("torch is built for CUDA 13.0", "install driver 580 or newer")
    monkeypatch.setattr(module, "unusable_gpus", lambda: unusable)
    (found,) = bad_of(driver, {"CPU": 64.0, "GPU": 8.0})
    assert found.check == "gpus" and found.text.endswith(unusable.problem)
    assert found.advice == unusable.advice


@pytest.mark.parametrize("sick", ["fails", "sums wrongly"])
def test_a_gpu_that_fails_beside_one_that_does_not(
    driver: Store, monkeypatch: pytest.MonkeyPatch, sick: str
) -> None:
    def ones(count: int, *, device: str) -> Any:
        if device == "cuda:1" and sick == "fails":
            raise RuntimeError("CUDA error:\nunspecified launch failure")
        return torch.full((count,), 2.0 if device == "cuda:1" else 1.0)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    monkeypatch.setattr(module.torch, "ones", ones)
    monkeypatch.setattr(module, "unusable_gpus", lambda: None)
    (found,) = bad_of(driver)
    said = {"fails": "CUDA error: unspecified launch", "sums wrongly": "must be 1024; got 2048"}
    assert "GPU 1 fails: RuntimeError: " in found.text and said[sick] in found.text


def test_a_folder_that_is_another_one_here(driver: Store) -> None:
    (found,) = bad_of(replace(driver, marker=Marker("marker", "other")))
    assert found.state == "bad" and f"does not see {driver.address} as the driver" in found.text
    (found,) = bad_of(replace(driver, address=f"{driver.address}/gone"))
    assert found.state == "bad" and not Path(f"{driver.address}/gone").exists()


def test_a_lock_of_another_process_is_seen(tmp_path: Path) -> None:
    (tmp_path / "marker").touch()
    words = ["flock", "--no-fork", str(tmp_path / "marker"), "sh", "-c", "echo locked; sleep 60"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        assert list(module._run_lock("one", tmp_path / "marker")) == []
        other.kill()
    with module._locked(tmp_path / "marker"):
        other_try = ["flock", "--shared", "--nonblock", str(tmp_path / "marker"), "true"]
        assert subprocess.run(other_try).returncode == 1


def _no_locks(handle: object, how: int) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.mark.parametrize(
    ("flock", "said"),
    [
        (lambda handle, how: None, "could lock a file in {} that the driver has locked"),
        (_no_locks, "cannot lock a file in {}: OSError: [Errno 38] Function not implemented"),
    ],
    ids=["locks of each machine", "no locks"],
)
def test_storage_whose_locks_keep_nobody_off(
    driver: Store, monkeypatch: pytest.MonkeyPatch, flock: Callable[[object, int], None], said: str
) -> None:
    monkeypatch.setattr(fcntl, "flock", flock)
    (found,) = bad_of(driver)
    assert found.text.endswith(said.format(driver.address)) and "localflock" in found.advice


MOUNTED = r"""
/dev/vda / ext4 rw,relatime 0 0
server:/all /shared nfs4 rw,relatime,vers=4.2,hard,proto=tcp 0 0
server:/runs /shared/runs nfs4 rw,relatime,vers=4.2,lookupcache=pos,hard 0 0
server:/old /with\040space nfs rw,vers=3 0 0
server:/over /over nfs rw 0 0
tmpfs /over tmpfs rw 0 0
tmpfs /shared/tmp tmpfs rw 0 0
""".lstrip()


@pytest.mark.parametrize(
    ("folder", "mount"),
    [
        ("/home/me/runs", None),
        ("/shared", "/shared"),
        ("/shared/mine", "/shared"),
        ("/shared/runs/mine", None),
        ("/shared/runs2", "/shared"),
        ("/shared/tmp/x", None),
        ("/with space/runs", "/with space"),
        ("/over/x", None),
        ("LINK/run", "/shared"),
    ],
)
def test_an_nfs_that_may_hide_a_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, mount: str | None
) -> None:
    monkeypatch.setattr(module, "MOUNTS", tmp_path / "mounts")
    assert list(module._nfs("one", Path(folder))) == []  # nothing is known
    (tmp_path / "mounts").write_text(MOUNTED)
    (tmp_path / "link").symlink_to("/shared/mine")
    found = list(module._nfs("one", Path(folder.replace("LINK", str(tmp_path / "link")))))
    text = f"one: the NFS at {mount} may hide a new file for a minute"
    assert [each.text for each in found] == ([text] if mount else [])


def test_images_are_written_and_read() -> None:
    assert [(each.check, each.state) for each in module._reading()] == [("ffcv", "ok")]


def test_a_node_without_ffcv_or_tbb(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba takes other threads without a word; more than one loader thread is refused."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "numba.np.ufunc.tbbpool", None)
        patch.setattr(sys, "prefix", "/nowhere")
        _, found = module._reading()
    assert found.state == "warn" and "DataError: data: more than 1 loader thread" in found.text
    monkeypatch.setitem(sys.modules, "pipeline.data.datasets.beton", None)
    (found,) = module._reading()
    assert found.state == "bad" and "images cannot be written and read: " in found.text


# ------------------------------------------------------------------------------- processes meet


def here(size: int) -> Meeting:
    return Meeting("127.0.0.1", free_port(), size, gpus=False)


def late(meeting: Meeting, rank: int, lost: str) -> None:
    """`meet` with the patience of 2 s; the second process fails to do a part of it."""
    Meeting.patience_s = 2.0  # type: ignore[assignment]
    if rank == 1 and lost == "start":
        return
    if rank == 1:
        distributed.all_reduce = lambda number: None
    meet(meeting, rank)


@pytest.mark.full
@pytest.mark.distributed
def test_two_processes_meet_or_say_why_not() -> None:
    with ProcessPoolExecutor(2, get_context("spawn")) as two:
        where = here(2)
        assert [each.result(60) for each in [two.submit(meet, where, rank) for rank in (0, 1)]] == [
            None
        ] * 2
    for lost, said in (("start", "(?i)timed? ?out"), ("sum", "^over gloo: ")):
        with ProcessPoolExecutor(2, get_context("spawn")) as two:
            where = here(2)
            first, second = [two.submit(late, where, rank, lost) for rank in (0, 1)]
            with pytest.raises(RuntimeError, match=said):
                first.result(60)
            if lost == "sum":
                with pytest.raises(RuntimeError, match=r"^the sum over gloo must be 3; got 2$"):
                    second.result(60)


def test_gpus_meet_over_nccl_and_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: both sums are asked for, and a wrong one is refused."""
    added: list[str] = []

    def all_reduce(number: Any) -> None:
        added.append(number.device)
        number.fill_(3 if len(added) < 4 else 4)

    tensor = torch.tensor
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(distributed, name, lambda *given, **more: None)
    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    asked: list[str] = []
    monkeypatch.setattr(
        module.torch, "tensor", lambda value, device: asked.append(device) or tensor(value)
    )
    where = Meeting("x", 1, 2, gpus=True)
    meet(where, 0)
    assert asked == ["cuda", "cpu"]
    with pytest.raises(RuntimeError, match=r"^the sum over gloo must be 3; got 4$"):
        meet(where, 0)


def test_more_processes_wait_longer_for_one_another() -> None:
    """64 of them load torch from one storage at once."""
    assert here(2).patience_s < 40 and 120 < here(64).patience_s < MEETING_S
