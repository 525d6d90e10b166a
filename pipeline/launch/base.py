"""What a launcher is. Worker processes import this: nothing of the driver's is needed here."""

from __future__ import annotations

from typing import Any, Protocol

from pipeline.worker import Job


class Launcher(Protocol):
    """Starts the workers of one run and waits for them."""

    workers: int

    def run(self, job: Job, attempt: str) -> dict[str, Any] | None:
        """Train to the end: the summary, or None when the run was asked to stop.

        Raises:
            Refused: something that the user has to change.
            LaunchError: the workers failed more often than allowed.
        """
        ...

    def close(self) -> None:
        """Stop what it started beyond one run's workers."""
        ...


class LaunchError(RuntimeError):
    """A run that failed, in one line."""
