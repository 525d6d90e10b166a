"""A checkpoint that the run's journal knows and that is nowhere: a disk that is not mounted, a bucket that somebody emptied."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from pipeline.track.jsonl import Event


def lost_step(events: Iterable[Event], *, keep: int) -> int | None:
    """The step of the newest checkpoint that must be there by what the journal says; None: none must be.

    Each start tells which one was the newest then. Of those that were saved since, the newest `keep` are there; one that was
    quarantined is accounted for, and has been told.
    """
    there: set[int] = set()
    for event in events:
        if event["event"] == "start":
            there = {step for step in {*there, event["step"]} if 0 < step <= event["step"]}
        elif event["event"] == "checkpoint":
            there = _newest(there, event["step"], keep)
        elif event["event"] == "quarantine" and (name := re.match(r"step_(\d+)", PurePosixPath(event["path"]).name)):
            # One that nobody told of was saved by a writer that died before it could, and took the place of an older one.
            there = _newest(there, int(name[1]), keep) - {int(name[1])}
    return max(there, default=None)


def _newest(there: set[int], step: int, keep: int) -> set[int]:
    return set(sorted({*there, step})[-keep:])
