"""Places for the workers of a run whose node is gone: how long they are waited for, and that
somebody is told of it.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.track.jsonl import OF_NONE, Journal
from pipeline.units import counted

PLACES_S = 3600.0
"""that places for all workers are waited for, where a node may come back or be replaced"""


class NoPlace(Exception):
    """They have been waited for in vain."""


def no_place(workers: int) -> str:
    found = f"launch: {counted(workers, 'worker')} found no place in time"
    return f"{found}: others have it, or a node is gone and none came in its stead"


def tell_waiting(folder: Path, workers: int) -> None:
    """Write down that no worker of the run in `folder` is left, and what is waited for; the driver
    shows it.

    Raises: OSError.
    """
    with Journal(folder / "journal.jsonl", attempt=OF_NONE) as journal:
        journal.event(
            "waiting", sync=True, what=f"a place for {counted(workers, 'worker')}", most_s=PLACES_S
        )
