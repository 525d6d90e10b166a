"""The line that a user can act on, out of Ray's nested exceptions."""

from __future__ import annotations

from collections.abc import Mapping

_LOST = (
    *(
        "connection closed by peer",
        "connection reset by peer",
        "timed out waiting",
        "timeout caused pair closure",
    ),  # gloo
    *("remote process exit", "communicator was aborted", "collective operation timeout"),  # NCCL
    *(
        "connection was likely closed",
        "process group was taken away",
    ),  # torch's store, and Ranks.raise_if_gone
)
"""what a worker says that has lost another one (torch 2.13)"""


def innermost(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, first = cause(failures)
        text = str(first).strip().splitlines()
        return f"worker {rank}: {text[-1] if text else type(first).__name__}"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1] if text else ''}"


def cause(failures: Mapping[int, BaseException]) -> tuple[int, BaseException]:
    """Of workers that failed together the lowest rank that has not only lost another one, and what
    it failed of.
    """
    found = {rank: getattr(error, "cause", None) or error for rank, error in failures.items()}
    rank = min(found, key=lambda rank: (_has_lost_another(found[rank]), rank))
    return rank, found[rank]


def _has_lost_another(error: BaseException) -> bool:
    """By a collective's error, which is a RuntimeError: a connection of its own, to storage say,
    fails with an OSError.
    """
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _LOST)
