"""What a worker knows of its run: the values that the driver sends it, and messages in the run's
folder.

The driver, the workers and commands write the messages. A worker that dies cannot write to the
journal, which rank 0 has open. Its launcher writes a note of the death for the process that opens
the journal next.
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
    recipe: dict[str, Any]  # the recipe at the launch, as JSON; compared with recipe.json
    parent: str | None = None  # the id of the suite's launch
    suite: str | None = None  # the name of the suite's folder
    family: str | None = None  # the MLflow experiment; all runs of a suite share one
    run_id: str = ""
    resume_command: str = ""
    trust: tuple[str, ...] = ()
    threads: int = 1  # torch's threads in each worker
    loader_threads: int = 1
    # a worker counts as hung after so many minutes without progress; 0: never
    hang_minutes: float = 0.0
    # the samples whose pages are compared with their checksums: data/ffcv/page_checks.py
    verify: Literal["sampled", "full"] = "sampled"
    # where checkpoints are stored: a folder or an address; "": in the run's folder
    checkpoints: str = ""
    # the token that lets the workers write to this store (checkpoint/store.py); "": none, because
    # the lock of the run's folder protects a store in this folder
    store_token: str = ""
    class_names: tuple[str, ...] = ()  # (): the data set has no names, or the run has phases
    # how the pictures of the data set were stored (`Manifest.options`); None: it is of another kind
    picture_options: dict[str, Any] | None = None
    own_cores: bool = False  # whether each worker on a CPU reserves cores (core/cpu_affinity.py)


@dataclass(frozen=True)
class Notice:
    """Machines that are about to be taken away."""

    machines: tuple[str, ...]
    deadline: float | None  # unix seconds; None: unknown


@dataclass(frozen=True)
class RankInfo:
    """The position of this worker among all workers of the run. With several workers, their process
    group exists.
    """

    rank: int = 0
    workers: int = 1
    device: str = "cpu"
    local_rank: int = 0  # among the workers of its machine
    # the numbers of workers that the run may have, ascending; (): only `workers`
    sizes: tuple[int, ...] = ()
    # returns the last notice that reached this worker, or None; not collective
    notice: Callable[[], Notice | None] = lambda: None

    @property
    def possible_sizes(self) -> tuple[int, ...]:
        return self.sizes or (self.workers,)


def stop_reason(run: Path) -> str:
    """The reason of a stop, such as "asked to stop by ..." if the requester is known."""
    file = RunFolder(run).stop_request
    requester = file.read_text().strip() if file.exists() else ""
    return f"asked to stop by {requester}" if requester else "asked to stop"


def was_stopped(run: Path) -> bool:
    """Whether there is a request to stop. A launch or resume deletes an older request."""
    return RunFolder(run).stop_request.exists()


def note_refusal(run: Path, error: ValueError) -> None:
    """Write a note of an error on one rank that a restart would only repeat."""
    write_json(RunFolder(run).refusal, {"error": str(error)})


def raise_refusal(run: Path) -> None:
    """Raise the error of `note_refusal`. A launch or resume deletes the note.

    Raises:
        UserError: there is a note.
    """
    if (file := RunFolder(run).refusal).exists():
        raise UserError(read_json(file)["error"])


def note_death(run: Path, *, worker: int, error: str) -> None:
    write_json(RunFolder(run).worker_death, {"worker": worker, "error": error})


def read_death(run: Path) -> dict[str, Any] | None:
    """The note of the last death that is not in the journal yet; None if there is no note. A
    damaged note is ignored, because the run can train without the note.
    """
    with suppress(ValueError):
        return read_json(RunFolder(run).worker_death)
    return None
