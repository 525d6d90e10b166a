"""A worker's knowledge of its run: values that are sent to it, and messages in the run's folder.

The driver, the workers and commands leave messages there. A worker that dies cannot write to the
journal, which rank 0 holds. Its launcher leaves a note of the death for the process that opens the
journal next.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.core.errors import UserError
from pipeline.core.run_folder import RunFolder
from pipeline.recipe.recipe import read_json, write_json


@dataclass(frozen=True)
class Job:
    """The values of one run that its workers need."""

    run: str  # the run's folder, absolute, on storage that every worker and the driver see
    study: str
    data_fingerprint: str
    commit: str
    recipe: dict[str, Any]  # the recipe of the launch as JSON, which recipe.json still has to hold
    parent: str | None = None  # shared by the runs of one suite
    suite: str | None = None  # the name of the suite's folder
    family: str | None = None  # the MLflow experiment; all runs of a suite share one
    run_id: str = ""
    resume_command: str = ""
    trust: tuple[str, ...] = ()
    threads: int = 1  # torch's threads in each worker
    loader_threads: int = 1
    # minutes without a sign of life after which a worker counts as hung; 0: never
    hang_minutes: float = 0.0
    # the samples whose pages are compared with their checksums: data/ffcv/page_checks.py
    verify: Literal["sampled", "full"] = "sampled"
    # the place of its checkpoints: a folder or an address; "": in the run's folder
    checkpoints: str = ""
    # the token with which its workers may write there (checkpoint/store.py); "": the place is the
    # run's folder, whose locks are enough
    store_token: str = ""
    own_cores: bool = False  # whether each worker on a CPU keeps to cores that no other run uses


@dataclass(frozen=True)
class Notice:
    """Machines that are about to be taken away."""

    machines: tuple[str, ...]
    deadline: float | None  # unix seconds; None: unknown


@dataclass(frozen=True)
class RankInfo:
    """The place of this worker among the others. If there are several, the process group exists."""

    rank: int = 0
    workers: int = 1
    device: str = "cpu"
    local_rank: int = 0  # among the workers of its machine
    # every number of workers that the run may have, ascending; (): only `workers`
    sizes: tuple[int, ...] = ()
    # the last notice that reached this worker, None without one; not collective
    notice: Callable[[], Notice | None] = lambda: None

    @property
    def possible_sizes(self) -> tuple[int, ...]:
        return self.sizes or (self.workers,)


def stop_requester(run: Path) -> str:
    """Who asked a run to stop, if that is known."""
    file = RunFolder(run).stop_request
    by = file.read_text().strip() if file.exists() else ""
    return f"asked to stop by {by}" if by else "asked to stop"


def was_stopped(run: Path) -> bool:
    """Whether somebody asked this run to stop since it was last launched or resumed."""
    return RunFolder(run).stop_request.exists()


def note_refusal(run: Path, error: ValueError) -> None:
    """Leave a note of an error that one rank met and that a restart would meet again."""
    write_json(RunFolder(run).refusal, {"error": str(error)})


def raise_refusal(run: Path) -> None:
    """Raise the error of `note_refusal`, if there is one. A launch or resume deletes the note.

    Raises:
        UserError: there is such a note.
    """
    if (file := RunFolder(run).refusal).exists():
        raise UserError(read_json(file)["error"])


def note_death(run: Path, *, worker: int, error: str) -> None:
    write_json(RunFolder(run).worker_death, {"worker": worker, "error": error})


def read_death(run: Path) -> dict[str, Any] | None:
    """The last death that is not in the journal yet. None if the note cannot be read: the run can
    train without it.
    """
    with suppress(ValueError):
        return read_json(RunFolder(run).worker_death)
    return None
