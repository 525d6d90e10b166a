"""What Ray is asked for, without any.

What workers are told through their environment.

Of workers that failed together the one is told that the others have failed of.

Which device the workers train on.

Cores and loader threads of a worker: its share of a node with GPUs, one on a CPU, and what
somebody has said.
"""

import errno
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import ray
import ray.train.torch
import torch
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from torch import distributed
from torch.distributed import DistBackendError, DistNetworkError

from pipeline.core.cpu_affinity import cores_here
from pipeline.core.errors import DataError, UserError
from pipeline.core.torch_settings import EXACT
from pipeline.data.ffcv import numba_threads
from pipeline.launch import ray_trainer
from pipeline.launch.cluster import (
    Cluster,
    Device,
    cores_and_loader_threads,
    workers_use_gpus,
)
from pipeline.launch.driver import Inline
from pipeline.launch.ray import LaunchError, Ray, WorkersEnded, _train
from pipeline.launch.ray_cluster import innermost, worker_environment
from pipeline.launch.ray_trainer import LoopbackConfig, NoResources
from pipeline.train.job import Job, RankInfo


@pytest.mark.parametrize(
    ("hang_minutes", "least"),
    [
        *((minutes, timedelta(minutes=minutes, seconds=300)) for minutes in (0.3, 30.0, 600.0)),
        (0.0, timedelta(days=1, seconds=1)),  # nobody watches
    ],
)
def test_workers_wait_for_one_another_until_long_after_a_watchdog_has_ended_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hang_minutes: float, least: timedelta
) -> None:
    """Else the one that is well gives up first, and Ray ends the other before it has said what it
    hangs in.
    """
    context = SimpleNamespace(
        get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_rank=lambda: 0
    )
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: "cpu")

    def work(job: Job, place: RankInfo) -> dict[str, Any]:
        group: Any = distributed.group.WORLD
        return {"patience": group._get_backend(torch.device("cpu")).options._timeout}

    distributed.init_process_group(
        "gloo",
        init_method=f"file://{tmp_path}/meeting",
        rank=0,
        world_size=1,
        timeout=timedelta(minutes=10),
    )
    try:
        told = _train(asdict(job_in(tmp_path, hang_minutes=hang_minutes)), work=work, sizes=(1,))
    finally:
        distributed.destroy_process_group()
    assert told is not None and told["patience"] >= least


@pytest.mark.parametrize(
    ("addresses", "alone"),
    [(["127.0.0.1"], True), (["10.0.0.1", "127.0.0.1"], False), (["10.0.0.1"], False)],
)
def test_a_cluster_is_of_this_machine_alone_where_all_of_its_nodes_are_on_loopback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, addresses: list[str], alone: bool
) -> None:
    asked = run(
        tmp_path,
        monkeypatch,
        None,
        nodes=[
            *[
                {"NodeManagerAddress": address, "Alive": True, "Resources": {}}
                for address in addresses
            ],
            {"NodeManagerAddress": "10.0.0.9", "Alive": False},
        ],
    )
    assert isinstance(asked["torch_config"], LoopbackConfig) is alone
    assert (
        asked["run_config"].worker_runtime_env["env_vars"].get("GLOO_SOCKET_IFNAME") == "lo"
    ) is alone


@pytest.mark.parametrize(
    ("cluster", "resources", "runs"),
    [
        (Cluster(workers=2, device="cpu"), {"CPU": 128.0}, cores_here() // 2),
        (Cluster(workers=2, device="cpu", address="auto"), {"CPU": 128.0}, None),
        # Each worker has a card.
        (Cluster(workers=2, address="auto"), {"CPU": 128.0, "GPU": 8.0}, 4),
    ],
)
def test_runs_side_by_side_have_cores_and_cards_of_their_own(
    monkeypatch: pytest.MonkeyPatch, cluster: Cluster, resources: dict[str, float], runs: int | None
) -> None:
    in_a_cluster(monkeypatch, **resources)
    assert Ray(cluster).max_parallel_runs() == runs


NODES = [
    {"NodeManagerAddress": f"10.0.0.{index}", "Alive": True, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    for index in range(2)
]


@pytest.mark.parametrize(
    ("said", "cores", "loaders"),
    [
        ({"device": "auto"}, 8, 8),
        ({"device": "auto", "cpus_per_worker": 4}, 4, 4),
        ({"device": "auto", "cpus_per_worker": 4, "loader_threads": 3}, 4, 3),
        ({"device": "cpu"}, 1, 1),
    ],
)
def test_a_worker_with_a_gpu_gets_its_share_of_the_node_and_one_on_a_cpu_a_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, Any], cores: int, loaders: int
) -> None:
    resources = {"CPU": 128.0, "GPU": 16.0}
    launcher = Ray(Cluster(workers=2, address="10.0.0.1:6379", **said))
    asked = run(tmp_path, monkeypatch, None, nodes=NODES, resources=resources, launcher=launcher)
    gpu = {} if said["device"] == "cpu" else {"GPU": 1}
    assert asked["scaling_config"].resources_per_worker == {"CPU": cores, **gpu}
    assert (asked["job"]["threads"], asked["job"]["loader_threads"]) == (cores, loaders)
    told = asked["run_config"].worker_runtime_env["env_vars"]
    assert (told["OMP_NUM_THREADS"], told["NUMBA_NUM_THREADS"]) == (str(cores), str(loaders))


def in_a_cluster(patch: pytest.MonkeyPatch, **resources: float) -> None:
    patch.setattr(os, "environ", {**os.environ})
    patch.setattr(ray, "init", lambda **about: None)
    patch.setattr(ray, "nodes", lambda: NODES)
    patch.setattr(ray, "cluster_resources", lambda: resources)


def test_cards_that_torch_cannot_use_are_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unusable = "torch cannot use the GPU here"
    monkeypatch.setattr("pipeline.launch.cluster.unusable_gpus", lambda: unusable)
    said = f"^launch: {unusable}$"
    monkeypatch.setattr(ray, "init", lambda **about: pytest.fail("started"))
    for device in ("auto", "gpu"):
        with pytest.raises(UserError, match=said), Ray(Cluster(workers=1, device=device)):
            pass
        with pytest.raises(UserError, match=said):
            Inline(device=device)
    assert Inline(device="cpu").device == "cpu"


def test_a_cluster_that_does_not_start_in_time_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_a_cluster(monkeypatch, CPU=2.0)
    late = Exception("The current node timed out during startup.")  # as Ray 2.60 raises it
    monkeypatch.setattr(ray, "init", Mock(side_effect=late))
    message = (
        "^ray: a cluster must start on this machine; got: The current node timed out during"
        r" startup\.; try again .* --inline$"
    )
    with pytest.raises(UserError, match=message), Ray(Cluster(workers=1, device="cpu")):
        pass


@pytest.mark.parametrize(
    ("about", "resources", "said"),
    [
        (
            {"workers": 17, "device": "gpu"},
            {"CPU": 128.0, "GPU": 16.0},
            "launch: each worker must get a GPU; got 17 workers and 16 GPUs; launch fewer"
            " workers, or"
            " use --device cpu",
        ),
        (
            {"workers": 9, "device": "gpu", "cpus_per_worker": 16},
            {"CPU": 128.0, "GPU": 16.0},
            "launch: 9 workers x 16 cpus need 144 cores; the cluster has 128",
        ),
        (
            {"workers": 1, "device": "gpu"},
            {"CPU": 2.0},
            "launch: each worker must get a GPU; got 1 worker and 0 GPUs; launch fewer workers, or"
            " use --device cpu",
        ),
        *(
            (
                {"workers": 2, "device": device},
                {"CPU": 2.0, "GPU": 1.0},
                "launch: each worker must get a GPU; got 2 workers and 1 GPU; launch fewer"
                " workers, or"
                " use --device cpu",
            )
            for device in ("auto", "gpu")
        ),
        (
            {"workers": 3, "device": "cpu"},
            {"CPU": 2.0},
            "launch: 3 workers x 1 cpu need 3 cores; the cluster has 2",
        ),
    ],
)
def test_more_than_there_is_is_refused_at_once(
    about: dict[str, Any],
    resources: dict[str, float],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_a_cluster(monkeypatch, **resources)
    cluster = Cluster(address="auto", **about)
    with pytest.raises(UserError, match=f"^{said}$"), Ray(cluster):
        pass
    with Ray(cluster, needs_cores=False):  # of the doctor: a cluster may be at rest
        pass


def test_a_wait_for_places_in_vain_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for failure in (WorkerGroupStartupTimeoutError(2), NoResources()):
        with pytest.raises(
            LaunchError,
            match=r"^launch: there were no resources for 2 workers in time: other jobs use"
            r" them, or a node",
        ):
            run(tmp_path, monkeypatch, ControllerError(failure))


@pytest.mark.parametrize(
    ("number", "is_for_the_user"), [(errno.ENOSPC, True), (errno.ESTALE, False)]
)
def test_of_what_the_user_alone_can_change_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_for_the_user: bool
) -> None:
    died = WorkerGroupError(
        "died", {0: OSError(number, "journal: it fails", "/runs/journal.jsonl")}
    )
    with pytest.raises(
        WorkersEnded,
        match=rf"^worker 0: \[Errno {number}\] journal: it fails: '/runs/journal\.jsonl'$",
    ) as ended:
        run(tmp_path, monkeypatch, died)
    assert ended.value.is_for_the_user == is_for_the_user


def job_in(folder: Path, **about: Any) -> Job:
    return Job(run=str(folder), study="s", data_fingerprint="f", commit="c", recipe={}, **about)


def run(
    folder: Path,
    patch: pytest.MonkeyPatch,
    error: Exception | None,
    *,
    nodes: Sequence[dict[str, Any]] = (),
    resources: Mapping[str, float] = {},
    launcher: Ray | None = None,
    **about: Any,
) -> dict[str, Any]:
    """What Ray's trainer is asked for, and the job; it ends in this error."""
    fit = Mock(side_effect=error, return_value=SimpleNamespace(return_value=None))
    trainer = Mock(return_value=SimpleNamespace(fit=fit))
    patch.setattr(ray_trainer, "Trainer", trainer)
    patch.setattr(ray, "cluster_resources", lambda: dict(resources))
    patch.setattr(ray, "nodes", lambda: list(nodes))
    launcher = Ray(Cluster(workers=2, device="cpu")) if launcher is None else launcher
    launcher.run(job_in(folder, **about), "1")
    asked = trainer.call_args.kwargs
    return {**asked, "job": asked["train_loop_config"]}


def test_ray_is_not_imported_before_its_settings_are_made() -> None:
    """Ray reads its settings and its token when it is imported; --inline needs no Ray."""
    assert (
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import pipeline.launch.suite, sys; sys.exit('ray' in sys.modules)",
            ],
            timeout=100,
        ).returncode
        == 0
    )


def told(**about: Any) -> dict[str, str]:
    return worker_environment(
        **{"threads": 1, "loader_threads": 1, "uses_gpus": False, "on_loopback": False, **about}
    )


@pytest.mark.parametrize(
    ("name", "is_passed_on"),
    [
        ("PYTORCH_CUDA_ALLOC_CONF", True),
        ("PYTORCH_ALLOC_CONF", True),
        ("CUBLAS_WORKSPACE_CONFIG", True),
        ("TRITON_CACHE_DIR", True),
        ("TORCHINDUCTOR_CACHE_DIR", True),
        ("TRITON_STORE_TOKEN", False),
        ("TORCHINDUCTOR_REMOTE_PASSWORD", False),
    ],
)
def test_settings_of_compilers_and_allocators_are_passed_on_and_secrets_are_not(
    name: str, is_passed_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "a value")
    assert (told().get(name) == "a value") == is_passed_on
    assert ("a value" in told().values()) == is_passed_on


def test_workers_on_cards_are_exact_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in EXACT:
        monkeypatch.delenv(name, raising=False)
    assert EXACT.items() <= told(uses_gpus=True).items() and not EXACT.keys() & told().keys()
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    assert told(uses_gpus=True)["NCCL_ALGO"] == "Tree"  # the user's own word


ADVICE = "Check the logs of the remote worker before reporting an error. GLHF!"
CLOSED = RuntimeError(
    f"[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:38545. {ADVICE}"
)
RESET = RuntimeError(
    "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:39554: Connection reset by peer."
    f" {ADVICE}"
)
LATE = RuntimeError(
    "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to"
    " complete"
)
REMOTE = DistBackendError(
    "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error,"
    " NCCL version 2.29.3\nncclRemoteError: A call failed possibly due to a network error or a"
    " remote process exiting prematurely."
)
STORE = DistNetworkError(
    "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or"
    " crash?"
)
TAKEN = RuntimeError("worker: Ray removed its process group during training")
LOST = (CLOSED, RESET, LATE, REMOTE, STORE, TAKEN)
DIED = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())


@pytest.mark.parametrize(
    "lost", LOST, ids=["closed", "reset", "late", "NCCL", "store", "taken away"]
)
@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (RuntimeError("the cable fell out"), "the cable fell out"),
        (
            ConnectionResetError(104, "Connection reset by peer"),
            "[Errno 104] Connection reset by peer",
        ),  # by storage
        (DIED, str(DIED).splitlines()[-1]),
    ],
    ids=["raised", "storage", "died"],
)
def test_who_has_lost_another_one_is_not_the_cause(
    lost: Exception, failure: Exception, said: str
) -> None:
    assert (
        innermost(
            WorkerGroupError(
                "died", {0: lost, 3: lost, 1: failure, 2: lost, 4: RuntimeError("another cause")}
            )
        )
        == f"worker 1: {said}"
    )


def test_where_all_have_lost_another_one_the_lowest_is_told() -> None:
    assert innermost(WorkerGroupError("died", {1: RESET, 0: CLOSED})) == f"worker 0: {CLOSED}"
    assert innermost(TimeoutError("first\nnot in time")) == "TimeoutError: not in time"


@pytest.mark.parametrize(
    ("device", "workers", "gpus", "expected"),
    [
        ("auto", 2, 0, False),
        ("auto", 2, 2, True),
        ("auto", 2, 8, True),
        ("cpu", 2, 8, False),
        ("gpu", 1, 1, True),
    ],
)
def test_gpus_are_taken_where_there_is_one_for_each_worker(
    device: Device, workers: int, gpus: int, expected: bool
) -> None:
    assert workers_use_gpus(device, workers, gpus) is expected


NODE = {"CPU": 64.0, "GPU": 8.0, "memory": 1e12}
HEAD = {"CPU": 4.0}


@pytest.mark.parametrize(
    ("nodes", "said", "share"),
    [
        ([NODE], {"uses_gpus": True}, (8, 8)),
        ([NODE, HEAD], {"uses_gpus": True}, (8, 8)),
        ([NODE, {"CPU": 30.0, "GPU": 4.0}], {"uses_gpus": True}, (7, 7)),
        ([{"CPU": 4.0, "GPU": 8.0}], {"uses_gpus": True}, (1, 1)),
        ([{"CPU": 0.0, "GPU": 1.0}], {"uses_gpus": True}, (1, 1)),
        ([], {"uses_gpus": True}, (1, 1)),
        ([NODE], {"uses_gpus": False}, (1, 1)),
        ([NODE], {"uses_gpus": True, "cores": 4}, (4, 4)),
        ([NODE], {"uses_gpus": True, "loader_threads": 2}, (8, 2)),
        ([NODE], {"uses_gpus": True, "cores": 16, "loader_threads": 12}, (16, 12)),
    ],
)
def test_the_share_of_a_worker_and_what_somebody_has_said_stays(
    nodes: list[dict[str, float]], said: dict[str, Any], share: tuple[int, int]
) -> None:
    assert cores_and_loader_threads(nodes, **said) == share


def test_without_tbb_one_thread_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba's wheels have none for ARM; the reader refuses several threads there."""
    none = Mock(side_effect=DataError("data: more than 1 loader thread needs TBB"))
    monkeypatch.setattr(numba_threads, "require_tbb", none)
    assert cores_and_loader_threads([NODE], uses_gpus=True) == (8, 1)
    # The reader refuses this, in its own words.
    assert cores_and_loader_threads([NODE], uses_gpus=True, loader_threads=8) == (8, 8)
