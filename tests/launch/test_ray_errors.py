"""Of workers that failed together the one is told that the others have failed of."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError
from torch.distributed import DistBackendError, DistNetworkError

from pipeline.launch.ray_errors import innermost

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
    failures = {0: lost, 3: lost, 1: failure, 2: lost, 4: RuntimeError("another cause")}
    assert innermost(WorkerGroupError("died", failures)) == f"worker 1: {said}"


def test_where_all_have_lost_another_one_the_lowest_is_told() -> None:
    assert innermost(WorkerGroupError("died", {1: RESET, 0: CLOSED})) == f"worker 0: {CLOSED}"


def test_what_is_no_worker_s_is_told_with_its_kind() -> None:
    assert innermost(TimeoutError("first\nnot in time")) == "TimeoutError: not in time"
