"""The conditions that a run was trained under: workers, micro-batch, machine and loaders.

A run may continue with other workers, on another machine, with other loader threads, with or
without reserved cores, or with half the micro-batch after memory ran out. Its seconds and peaks of
memory then belong to all of these conditions together. They compare with no single one of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.track.events import Start, kind_of

FIELDS = ("world_size", "micro_batch", "hardware", "loader_threads", "own_cores")


def trained_on(events: Sequence[Mapping[str, Any]], *, steps: int | None) -> list[dict[str, Any]]:
    """The FIELDS of each start in a journal that the result depends on.

    Oldest first, each combination once. A start does not count if the next one began at its step or
    before, as then all its steps were repeated. A start that had nothing left to train does not
    count either. `steps` is the number of steps of the finished run; with None the run goes on, and
    its newest start counts.
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


def conditions_of(
    summary: Mapping[str, Any], events: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """The conditions of a finished run: of its summary, else of its journal, else the last alone.

    An entry that lacks a field has the value that the summary gives for the end of the run.
    """
    found = summary.get("trained_on") or trained_on(events, steps=summary.get("steps"))
    return [
        _fields({**summary, **{name: value for name, value in on.items() if value is not None}})
        for on in found or [{}]
    ]


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """FIELDS of a start or a summary. Only a start lists its reserved cores one by one."""
    found = {name: values.get(name) for name in FIELDS}
    return {**found, "own_cores": bool(found["own_cores"])}


def _first(start: Mapping[str, Any]) -> int:
    return start.get("step") or 0
