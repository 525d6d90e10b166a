"""What every worker of a run is told: as plain values that travel, and by files in its folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.core.errors import UserError
from pipeline.core.run_folder import RunFolder
from pipeline.recipe.recipe import read_json, write_json


@dataclass(frozen=True)
class Job:
    """One run, as its workers need to know it."""

    run: str
    """the run's folder, absolute, on storage that every worker and the driver see"""
    study: str
    data_fingerprint: str
    commit: str
    recipe: dict[str, Any]
    """the JSON of the recipe that was launched, which recipe.json has to hold still"""
    parent: str | None = None
    """shared by the runs of one suite"""
    suite: str | None = None
    """the name of its folder"""
    family: str | None = None
    """what its runs are kept under in MLflow; all of a suite under one"""
    run_id: str = ""
    resume_command: str = ""
    trust: tuple[str, ...] = ()
    threads: int = 1
    """torch's threads in each worker"""
    loader_threads: int = 1
    hang_minutes: float = 0.0
    """between two signs of life of a worker, after which it is taken to hang; 0: nobody watches"""
    verify: Literal["sampled", "full"] = "sampled"
    """for which of the samples that are read the page that holds them is compared with its
    checksum: see data/ffcv/page_checks.py
    """
    checkpoints: str = ""
    """where its checkpoints are: a folder or an address of its own; "": in the run's folder"""
    place_token: str = ""
    """by which its workers write there (pipeline/train/checkpoint/place.py); "": in the run's
    folder,
    whose locks are enough
    """
    own_cores: bool = False
    """whether each worker on a CPU keeps to cores that no other run's computes on"""


@dataclass(frozen=True)
class Notice:
    """Machines that are about to be taken away."""

    machines: tuple[str, ...]
    deadline: float | None
    """unix seconds; None: nobody has said"""

    @property
    def seconds_left(self) -> float | None:
        """From now on."""
        return None if self.deadline is None else self.deadline - time.time()

    @classmethod
    def in_file(cls, save: Path) -> Notice | None:
        """What whoever asks for a save knows of it; None where that is nothing."""
        try:
            told = json.loads(save.read_text())
            return cls(tuple(told["machines"]), told["deadline"]) if told["machines"] else None
        except (OSError, ValueError, KeyError, TypeError):  # gone, or asked for by hand
            return None


def no_notice() -> Notice | None:
    """Where nobody takes machines away, or nobody tells."""
    return None


@dataclass(frozen=True)
class RankInfo:
    """Where this worker stands among the others; the process group exists when there are
    several.
    """

    rank: int = 0
    workers: int = 1
    device: str = "cpu"
    local_rank: int = 0
    """among the workers of its machine"""
    sizes: tuple[int, ...] = ()
    """every number of workers that the run may have, ascending; none: `workers`"""
    notice: Callable[[], Notice | None] = no_notice
    """what this worker has been told of machines that are about to be taken away; asks nobody"""


def asked_by(run: Path) -> str:
    """Who asked a run to stop, where that is known."""
    file = RunFolder(run).stop
    by = file.read_text().strip() if file.exists() else ""
    return f"asked to stop by {by}" if by else "asked to stop"


def was_stopped(run: Path) -> bool:
    """Whether somebody asked this run to stop since it was last launched or resumed."""
    return RunFolder(run).stop.exists()


def note_refusal(run: Path, error: ValueError) -> None:
    """Write down, for the next attempt, what one rank found that a restart would only find
    again.
    """
    write_json(RunFolder(run).refusal, {"said": str(error)})


def raise_refusal(run: Path) -> None:
    """Raise what the last attempt wrote down. The driver clears it when the user launches or
    resumes.

    Raises:
        UserError: it is there.
    """
    if (file := RunFolder(run).refusal).exists():
        raise UserError(read_json(file)["said"])
