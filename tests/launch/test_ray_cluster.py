"""What workers are told through their environment.

Of workers that failed together the one is told that the others have failed of.
"""

from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError
from torch.distributed import DistBackendError, DistNetworkError

from pipeline.core.torch_settings import EXACT
from pipeline.launch.ray_cluster import innermost, passed_on, worker_environment


def told(**about: Any) -> dict[str, str]:
    return worker_environment(
        **{"threads": 1, "loader_threads": 1, "gpus": False, "alone": False, **about}
    )


@pytest.mark.parametrize(
    "name",
    [
        "PYTORCH_CUDA_ALLOC_CONF",
        "PYTORCH_ALLOC_CONF",
        "CUBLAS_WORKSPACE_CONFIG",
        "TRITON_CACHE_DIR",
        "TORCHINDUCTOR_CACHE_DIR",
    ],
)
def test_settings_of_compilers_and_allocators_are_passed_on(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "a value")
    assert passed_on()[name] == told()[name] == "a value"


def test_secrets_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_STORE_TOKEN", "secret")
    monkeypatch.setenv("TORCHINDUCTOR_REMOTE_PASSWORD", "secret")
    assert "secret" not in told().values()


def test_workers_on_cards_are_exact_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in EXACT:
        monkeypatch.delenv(name, raising=False)
    assert EXACT.items() <= told(gpus=True).items() and not EXACT.keys() & told().keys()
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    assert told(gpus=True)["NCCL_ALGO"] == "Tree"  # the user's own word


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
TAKEN = RuntimeError("worker: its process group was taken away while it trained")
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


def test_what_is_no_worker_s_is_told_with_its_kind() -> None:
    assert innermost(TimeoutError("first\nnot in time")) == "TimeoutError: not in time"
