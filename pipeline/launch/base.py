"""What a launcher is. Worker processes import this: nothing of the driver's is needed here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

from pipeline.core.errors import UserError
from pipeline.measure.driver import unusable_gpus
from pipeline.train.job import Job

Device = Literal["auto", "cpu", "gpu"]


def takes_gpus(device: Device, workers: int, gpus: int) -> bool:
    """Whether each worker gets a GPU: `auto` takes them where there are any, and there must be one
    for each.

    Raises:
        UserError: fewer GPUs than workers; nobody would notice that the rest train on CPUs.
    """
    if device == "cpu" or (device == "auto" and gpus == 0):
        return False
    if gpus < workers:
        need = "1 worker needs a GPU" if workers == 1 else f"{workers} workers need as many GPUs"
        fewer = "fewer workers or " if gpus else ""
        raise UserError(
            f"launch: {need}; there {'is' if gpus == 1 else 'are'} {gpus}; take {fewer}--device cpu"
        )
    return True


def refuse_unusable_cards(device: Device) -> None:
    """Raises: UserError where this machine has GPUs that torch cannot use; with `cpu` nobody asks
    for
    them.
    """
    if device != "cpu" and (found := unusable_gpus()) is not None:
        raise UserError(f"launch: {found}")


class Launcher(Protocol):
    """Starts the workers of one run after another and waits for them. Entered and left in the
    process's main thread.
    """

    workers: int

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    def room(self) -> int:
        """How many runs of so many workers find cores and cards of their own at the same time."""
        ...

    def joining(self) -> list[str]:
        """What `spiketrain resume` is told, in another process, to train where this one does."""
        ...

    def run(self, job: Job, attempt: str) -> dict[str, Any] | None:
        """Train to the end: the summary, or None when the run was asked to stop.

        Raises:
            UserError: something that the user has to change.
            LaunchError: the workers failed more often than allowed.
        """
        ...


@dataclass(frozen=True)
class Silent:
    """A node that was asked something and gave no answer."""

    address: str
    why: str


class LaunchError(RuntimeError):
    """A run that failed, in one line."""


class WorkersEnded(LaunchError):
    """Workers died of it, or raised it, and are not started again."""

    def __init__(self, told: str, *, is_for_the_user: bool = False) -> None:
        super().__init__(told)
        self.is_for_the_user = is_for_the_user
        """whether it lasts until a user changes something"""
