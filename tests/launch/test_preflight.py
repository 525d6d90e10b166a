"""`spiketrain doctor`: each check finds what it is about, and one sick node hides no other."""

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.cli.track import doctor
from pipeline.core.files import Marker
from pipeline.launch import preflight as module
from pipeline.launch.preflight import (
    PACKAGES,
    Finding,
    NodeReport,
    Stores,
    check_mlflow,
    check_store,
    compare,
    examine,
    preflight,
)
from tests.helpers.nodes import TOKEN, nodes
from tests.helpers.s3 import s3_server

ONE = NodeReport("one", {"python": "3.11.7", **dict.fromkeys(PACKAGES, "1.0")})
TWO = replace(ONE, name="two")
WITH_GPU = replace(ONE, gpus=("H100",))
FULL = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
SCRIPT = """
import sys, time
from pathlib import Path
from pipeline.launch import preflight
from pipeline.launch.cluster import Cluster
from pipeline.launch.ray import Ray

def is_first(file):
    try:
        Path(file).touch(exist_ok=False)
        return True
    except FileExistsError:
        return False

def raises(folder, resources):
    if is_first(folder + "/r"):
        raise RuntimeError("two lines\\nCUDA error: unspecified launch failure")
    return resources["CPU"]

def hangs(folder, resources):
    time.sleep(600 if is_first(folder + "/h") else 0)
    return resources["CPU"]

with Ray(Cluster(address=sys.argv[1])):
    for work, seconds in ((raises, 60), (hangs, 6)):
        preflight.examine, preflight.NODE_TIMEOUT_S = work, seconds
        found = preflight._examine_nodes(sys.argv[2])
        print(sorted((getattr(each, "text", each) for each in found), key=str))
"""


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_one_of_two_nodes_raises_and_hangs(tmp_path: Path) -> None:
    with nodes({}) as cluster:
        cluster.add()
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, cluster.address, str(tmp_path)],
            timeout=200,
            capture_output=True,
            text=True,
            env={**os.environ, **TOKEN},
        )
    assert done.returncode == 0, done.stderr[-3000:]
    raised, hung = done.stdout.strip().splitlines()
    assert raised.startswith("[1.0, ") and "cannot be examined: RuntimeError: CUDA error" in raised
    assert hung.startswith("[1.0, ") and "cannot be examined: it does not answer in time" in hung


# ----------------------------------------------------------------------------- a whole preflight


@pytest.fixture
def no_ffcv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_check_reading", lambda: [Finding("ffcv", "ok", "read")])


@pytest.fixture
def sick(monkeypatch: pytest.MonkeyPatch, no_ffcv: None) -> None:
    def examine_nodes(stores: Stores) -> list[NodeReport | Finding]:
        return [examine(stores, resources={"CPU": 4.0}), Finding("node", "bad", "it is silent")]

    monkeypatch.setattr(module, "Ray", lambda cluster, needs_cores: nullcontext())
    monkeypatch.setattr(module, "_examine_nodes", examine_nodes)
    monkeypatch.setattr(module, "_check_network", lambda runs: Finding("network", "ok", "reached"))


@pytest.mark.usefixtures("sick")
def test_a_node_that_does_not_answer_hides_no_other(tmp_path: Path) -> None:
    found = preflight(tmp_path, address="auto")
    [bad] = [each for each in found if each.state == "bad"]
    assert (bad.check, bad.text) == ("node", "it is silent")
    assert {"versions", "gpus", "ffcv", "storage", "network", "mlflow"} <= {
        each.check for each in found if each.state == "ok"
    }
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_ffcv")
def test_local_is_this_machine_and_starts_no_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Ray", lambda cluster: pytest.fail(f"a Ray at {cluster.address}"))
    for address in (None, "local"):
        assert [each.check for each in preflight(tmp_path, address=address)] == [
            "versions",
            "gpus",
            "ffcv",
            "storage",
            "mlflow",
        ]


@pytest.mark.usefixtures("sick")
def test_each_node_tries_where_checkpoints_are_kept(tmp_path: Path) -> None:
    runs, place = tmp_path / "runs", tmp_path / "kept"
    found = [
        each
        for each in preflight(runs, address="auto", checkpoints=str(place))
        if each.check == "storage"
    ]
    assert [each.state for each in found] == ["ok", "ok"]
    assert f"written to {runs}" in found[0].text and f"written to {place}" in found[1].text
    assert list(place.iterdir()) == []
    [bad, _] = [
        each
        for each in preflight(runs, address="auto", checkpoints="nosuch://x")
        if each.state == "bad"
    ]
    assert "cannot use nosuch://x: ValueError: Protocol not known" in bad.text


@pytest.mark.parametrize("address", ["s3://AKIA:planted@bucket/p", "s3://bucket/p?key=planted"])
def test_an_address_with_credentials_is_refused_first(address: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold no credentials") as refused:
        doctor(runs=tmp_path / "runs", checkpoints=address)
    assert "planted" not in str(refused.value) and not (tmp_path / "runs").exists()


def test_a_full_disk_is_reported_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_marker_in", FULL)
    (found,) = preflight(tmp_path / "runs")
    assert (found.check, found.state) == ("storage", "bad") and found.text.startswith(
        f"this machine cannot use {tmp_path / 'runs'}: OSError: [Errno 28] No space"
    )
    assert "free space" in found.advice and found.text.endswith("; nothing else was examined")


# ------------------------------------------------------------------------------ nodes are compared


@pytest.mark.parametrize(
    ("reports", "found"),
    [
        ([], []),
        ([ONE], []),
        ([ONE, TWO], []),
        (
            [ONE, replace(TWO, versions={**ONE.versions, "torch": "2.0"})],
            [("bad", "torch: one has 1.0, two has 2.0")],
        ),
        (
            [replace(ONE, versions={**ONE.versions, "ffcv": "not installed"})],
            [("warn", "ffcv is not installed")],
        ),
        ([WITH_GPU, replace(TWO, gpus=("A100",))], [("warn", "one: H100; two: A100")]),
        # Its driver may have been gone as Ray counted.
        ([WITH_GPU, TWO], [("warn", "one: H100; two: no GPU")]),
        # A head without workers and a node with a bad GPU are not compared.
        ([WITH_GPU, replace(TWO, can_train=False)], []),
        ([WITH_GPU, replace(TWO, findings=(Finding("gpus", "bad", "x"),))], []),
    ],
)
def test_nodes_are_compared(reports: list[NodeReport], found: list[tuple[str, str]]) -> None:
    differ = [each for each in compare(reports) if each.state != "ok"]
    assert [(each.state, each.text) for each in differ] == found
    assert all(each.advice for each in differ)


def test_nodes_that_are_alike() -> None:
    both, alone = (next(compare(reports)).text for reports in ([ONE, TWO], [ONE]))
    assert both == f"{alone}, the same on 2 nodes"


# ------------------------------------------------------------------------------------ on one node


@pytest.fixture
def driver(tmp_path: Path, no_ffcv: None) -> Iterator[Stores]:
    with module._marker_in(str(tmp_path)) as marker:
        yield {str(tmp_path): marker}


def bad_of(stores: Stores, resources: dict[str, float] | None = None) -> list[Finding]:
    return [each for each in examine(stores, resources=resources).findings if each.state != "ok"]


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
    driver: Stores,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    resources: Any,
    visible: str | None,
    promised: int,
    trains: bool,
) -> None:
    """Ray's count holds where there is a Ray, else the number of the driver's files of GPUs."""
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(module, "DEVICES", tmp_path)
    monkeypatch.setattr(module, "unusable_gpus", lambda: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    report = examine(driver, resources=resources)
    assert [each.text.split(": ")[1] for each in report.findings if each.check == "gpus"] == (
        [f"torch finds 0 of {promised} GPUs"] if promised else []
    )
    assert report.can_train == trains


def test_gpus_that_torch_cannot_use_are_reported_once(
    driver: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    unusable = "torch cannot use the GPU here"
    monkeypatch.setattr(module, "unusable_gpus", lambda: unusable)
    (found,) = bad_of(driver, {"CPU": 64.0, "GPU": 8.0})
    assert found.check == "gpus" and found.text.endswith(unusable)


@pytest.mark.parametrize("sick", ["fails", "sums wrongly"])
def test_a_gpu_that_fails_beside_one_that_does_not(
    driver: Stores, monkeypatch: pytest.MonkeyPatch, sick: str
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
    assert (
        "GPU 1 fails: " in found.text
        and {"fails": "CUDA error: unspecified launch", "sums wrongly": "must be 1024; got 2048"}[
            sick
        ]
        in found.text
    )


def test_a_folder_that_is_another_one_here(driver: Stores, tmp_path: Path) -> None:
    (found,) = bad_of({str(tmp_path): Marker("marker", "other")})
    assert found.state == "bad" and "is not the folder of this name on the driver's" in found.text
    (found,) = bad_of({f"{tmp_path}/gone": driver[str(tmp_path)]})
    assert found.state == "bad" and not Path(f"{tmp_path}/gone").exists()


def test_a_lock_of_another_process_is_seen(tmp_path: Path) -> None:
    (tmp_path / "marker").touch()
    with subprocess.Popen(
        ["flock", "--no-fork", str(tmp_path / "marker"), "sh", "-c", "echo locked; sleep 60"],
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        assert [*module._check_lock("one", tmp_path / "marker")] == []
        other.kill()
    with module._marker_in(str(tmp_path)) as marker:
        assert marker is not None
        assert (
            subprocess.run(
                ["flock", "--shared", "--nonblock", str(tmp_path / marker.name), "true"]
            ).returncode
            == 1
        )


@pytest.mark.parametrize(
    ("flock", "reason"),
    [
        (lambda handle, how: None, "a second lock was granted"),
        (Mock(side_effect=OSError(errno.ENOSYS, "not implemented")), "[Errno 38] not implemented"),
    ],
    ids=["locks of each machine", "no locks"],
)
def test_storage_whose_locks_keep_nobody_off(
    driver: Stores,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flock: Callable[[object, int], None],
    reason: str,
) -> None:
    monkeypatch.setattr(fcntl, "flock", flock)
    (found,) = bad_of(driver)
    assert (
        found.text.endswith(f"does not see the driver's lock in {tmp_path}: OSError: {reason}")
        and "localflock" in found.advice
    )


def test_images_are_written_and_read() -> None:
    assert [(each.check, each.state) for each in module._check_reading()] == [("ffcv", "ok")]


def test_a_node_without_ffcv_or_tbb(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba takes other threads without a word; more than one loader thread is refused."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "numba.np.ufunc.tbbpool", None)
        patch.setattr(sys, "prefix", "/nowhere")
        _, found = module._check_reading()
    assert found.state == "warn" and "DataError: data: more than 1 loader thread" in found.text
    monkeypatch.setitem(sys.modules, "pipeline.data.datasets.beton", None)
    [found] = module._check_reading()
    assert found.state == "bad" and "images cannot be written and read: " in found.text


# ---------------------------------------------------------------------------------- whole clusters


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_doctor_examines_a_cluster(tmp_path: Path) -> None:
    with nodes({}) as cluster:
        cluster.add()
        # Of several clusters on this machine `auto` is the one that RAY_ADDRESS names.
        environment = {**os.environ, **TOKEN, "RAY_ADDRESS": cluster.address, "COLUMNS": "300"}
        words = [sys.executable, "-m", "pipeline", "doctor", "--address", "auto"]
        words += ["--runs", str(tmp_path / "runs"), "--checkpoints", str(tmp_path / "kept")]
        done = subprocess.run(words, timeout=200, capture_output=True, text=True, env=environment)
    assert "2 processes reached one another" in done.stdout, done.stdout + done.stderr
    assert f"an object was written to {tmp_path / 'kept'}, read and deleted" in done.stdout
    assert "the driver's lock" not in done.stdout
    assert [*(tmp_path / "kept").iterdir()] == [*(tmp_path / "runs").iterdir()] == []


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_processes_add_up_a_number(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    devices: list[str] = []
    sums = [3, 3, 4, 4]

    def tensor(value: int, device: str) -> torch.Tensor:
        devices.append(device)
        return torch.ones(1, dtype=torch.int64) * value

    processes = SimpleNamespace(
        get_world_size=lambda: 2,
        get_rank=lambda: 0,
        new_group=lambda backend: backend,
        get_backend=lambda: backend,
        all_reduce=lambda x, group: x.fill_(sums.pop(0)),
    )
    monkeypatch.setattr(module, "distributed", processes)
    monkeypatch.setattr(module.torch, "tensor", tensor)
    module.check_sums()
    assert devices == (["cuda", "cpu"] if backend == "nccl" else ["cpu"])
    sums[:] = [4]
    with pytest.raises(RuntimeError, match=r"^the sum on c[a-z]+ must be 3; got 4$"):
        module.check_sums()


# ---------------------------------------------------------------------------------------- storage


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as address:
        yield address


def names(address: str) -> list[str]:
    fs, root = fsspec.url_to_fs(address, use_listings_cache=False, skip_instance_cache=True)
    return fs.find(root)


@pytest.mark.parametrize(
    "place",
    [
        "{folder}/not/there",
        "file://{folder}/not/there",
        "memory://checkpoints/{name}",
        "{bucket}/{name}",
    ],
    ids=["folder", "file", "memory", "s3"],
)
def test_an_object_is_written_found_read_and_deleted(
    place: str, bucket: str, tmp_path: Path
) -> None:
    address = place.format(folder=tmp_path, bucket=bucket, name=uuid.uuid4().hex)
    with module._marker_in(address) as marker:
        found = check_store(address, marker)
    assert found.state == "ok" and f"an object was written to {address}" in found.text
    assert ("GB are free" in found.text) == ("not/there" in address)
    assert names(address) == []


def test_a_bucket_that_is_not_there_is_not_made(bucket: str) -> None:
    assert (
        "s3://another/prefix: FileNotFoundError: The specified bucket does"
        in check_store("s3://another/prefix").text
    )
    assert fsspec.filesystem("s3", skip_instance_cache=True).ls("", detail=False) == [
        bucket.removeprefix("s3://")
    ]


DENIED = Mock(side_effect=PermissionError("Access Denied\nto AKIAPLANTED with planted-secret"))
SAID = "PermissionError: Access Denied to $AWS_ACCESS_KEY_ID with $AWS_SECRET_ACCESS_KEY"


@pytest.mark.parametrize(
    ("name", "act", "said"),
    [
        *((name, DENIED, SAID) for name in ("pipe_file", "ls", "cat_file", "rm_file")),
        (
            "cat_file",
            lambda *given: b"other",
            "ValueError: the object that was written is not listed, or differs",
        ),
    ],
)
def test_what_is_forbidden_or_wrong_is_named_and_no_secret_is(
    name: str, act: Callable[..., Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAPLANTED")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    monkeypatch.setenv("MONKEY", "to")  # a word that is no secret, for all its name
    address = f"memory://{uuid.uuid4().hex}"
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, name, act)
        found = check_store(address)
    assert found.state == "bad" and found.text.endswith(f"cannot use {address}: {said}")
    assert names(address) == [] or name == "rm_file"


# ----------------------------------------------------------------------------------------- MLflow


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


@contextmanager
def server(*, password: str) -> Iterator[str]:
    """Its HOST:PORT."""

    class Answer(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.send_response(200 if self.headers.get("Authorization") == password else 401)
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{http.server_port}"
        http.shutdown()


ME = "Basic bWU6cGFzcw=="  # me:pass


def test_a_tracking_server() -> None:
    with server(password=ME) as place:
        assert check_mlflow(f"http://{place}").state == "bad"
        found = check_mlflow(f"http://me:pass@{place}")
        assert found.state == "ok" and "pass@" not in found.text
    found = check_mlflow(f"http://{place}")
    assert found.state == "bad" and found.text.startswith(f"http://{place}: ") and found.advice


@pytest.mark.parametrize("token", ["planted-token\n", "planted\ntoken"])
def test_a_token_that_no_header_may_hold_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", token)
    with server(password="Bearer x") as place:
        found = check_mlflow(f"http://{place}")
    assert found.state == "bad" and "planted" not in found.text


def test_a_store_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (kept := tmp_path / "x.db", tmp_path / "not" / "there" / "x.db"):
        assert check_mlflow(f"sqlite:///{file}").state == "ok"
    kept.touch()
    assert check_mlflow(f"sqlite:///{kept}").state == "ok"
    assert [*tmp_path.iterdir()] == [kept]
    for file, why in ((kept / "x.db", "Not a directory"), (tmp_path, "Is a directory")):
        found = check_mlflow(f"sqlite:///{file}")
        assert f"the store {file} cannot be written: " in found.text and why in found.text
    monkeypatch.setattr(tempfile, "TemporaryFile", FULL)
    assert check_mlflow(f"sqlite:///{kept}").text.endswith("No space left on device")


@pytest.mark.parametrize(
    "uri", ["mlflow.example.org:5000", "htp://a", "./mlruns", "postgresql://u:planted@nobody/x"]
)
def test_what_is_not_an_address_of_a_store(uri: str) -> None:
    found = check_mlflow(uri)
    assert found.state == "bad" and "must be http://HOST:PORT" in found.text and found.advice
    assert "planted" not in found.text
