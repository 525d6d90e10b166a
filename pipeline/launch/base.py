"""What a launcher is. Worker processes import this: nothing of the driver's is needed here."""

from __future__ import annotations

from typing import Any, Protocol, Self

from pipeline.job import Job


class Launcher(Protocol):
    """Starts the workers of one run after another and waits for them. Entered and left in the process's main thread."""

    workers: int

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    def run(self, job: Job, attempt: str) -> dict[str, Any] | None:
        """Train to the end: the summary, or None when the run was asked to stop.

        Raises:
            Refused: something that the user has to change.
            LaunchError: the workers failed more often than allowed.
        """
        ...


class LaunchError(RuntimeError):
    """A run that failed, in one line."""
