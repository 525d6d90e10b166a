"""What a run was trained on: workers, micro-batch, machine and loaders of each of its starts that
its result rests on.

A run may go on with other workers, on another machine, with other loader threads, on cores of its
own or beside others, or with half the micro-batch where memory ran out. What it adds up over its
starts, seconds and peaks of memory, is then of all of them, and to be set beside that of no single
one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.track.events import Start, kind_of

FIELDS = ("world_size", "micro_batch", "hardware", "loader_threads", "own_cores")


def trained_on(events: Sequence[Mapping[str, Any]], *, steps: int | None) -> list[dict[str, Any]]:
    """FIELDS of the starts in a journal whose steps count, oldest first, each combination once.

    A start whose steps were all made again, because the next one began no later than it did, does
    not count, nor one that found nothing left to train. `steps`: of the finished run; None: it goes
    on, and its newest start counts.
    """
    kept: list[Mapping[str, Any]] = []
    for start in (event for event in events if kind_of(event) is Start):
        kept = [*(earlier for earlier in kept if _first(earlier) < _first(start)), start]
    trained = [start for start in kept if steps is None or _first(start) < steps]
    found: list[dict[str, Any]] = []
    for start in trained or kept[-1:]:
        on = _fields(start)
        if on not in found:
            found.append(on)
    return found


def told_in(
    summary: Mapping[str, Any], events: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """What the summary of a finished run says of it; of one that does not say, its journal, or the
    last machine alone.

    What an entry does not tell, of a version that kept less of each start, is as it was at the end.
    """
    found = summary.get("trained_on") or trained_on(events, steps=summary.get("steps"))
    return [
        _fields({**summary, **{name: value for name, value in on.items() if value is not None}})
        for on in found or [{}]
    ]


def _fields(told: Mapping[str, Any]) -> dict[str, Any]:
    """Of a start, which tells its own cores one by one, or of a summary, which says whether there
    were any.
    """
    return {**{name: told.get(name) for name in FIELDS}, "own_cores": bool(told.get("own_cores"))}


def _first(start: Mapping[str, Any]) -> int:
    """The step that it began at."""
    return start.get("step") or 0
