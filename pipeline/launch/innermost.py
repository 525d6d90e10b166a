"""The line that a user can act on, out of Ray's nested exceptions."""

from __future__ import annotations


def innermost(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, first = sorted(failures.items())[0]
        text = str(getattr(first, "cause", None) or first).strip().splitlines()
        return f"worker {rank}: {text[-1] if text else type(first).__name__}"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1] if text else ''}"
