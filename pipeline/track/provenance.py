"""The conditions that a run was trained under: workers, micro-batch, machine and loaders.

A run may continue with other workers, on another machine, with other loader threads, with or
without reserved cores, or with half the micro-batch after memory ran out. Its times and memory
peaks then belong to all of these conditions together and to none of them alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.track.events import Start, kind_of

FIELDS = ("world_size", "micro_batch", "hardware", "loader_threads", "own_cores")


def trained_on(events: Sequence[Mapping[str, Any]], *, steps: int | None) -> list[dict[str, Any]]:
    """The FIELDS of each start in a journal that contributed to the result.

    The oldest is first, and each combination occurs once. A start does not count if the next start
    began at the same step or earlier: all its steps were repeated. A start without steps left to
    train does not count either. `steps` is the number of steps of the finished run. None: the run
    continues, and its newest start counts.
    """
    kept: list[Mapping[str, Any]] = []
    for start in (event for event in events if kind_of(event) is Start):
        kept = [*(earlier for earlier in kept if earlier["step"] < start["step"]), start]
    trained = [start for start in kept if steps is None or start["step"] < steps]
    conditions = [_fields(start) for start in trained or kept[-1:]]
    return [each for place, each in enumerate(conditions) if each not in conditions[:place]]


def conditions_of(
    summary: Mapping[str, Any], events: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """The conditions of a finished run, from its summary, or else from its journal.

    Without either, they are those at the end of the run. If an entry lacks a field, the summary's
    value for the end of the run takes its place.
    """
    return [
        _fields({**summary, **{name: value for name, value in fields.items() if value is not None}})
        for fields in summary.get("trained_on")
        or trained_on(events, steps=summary.get("steps"))
        or [{}]
    ]


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """FIELDS of a start or a summary. `own_cores` becomes a bool: only starts list the cores."""
    fields = {name: values.get(name) for name in FIELDS}
    return {**fields, "own_cores": bool(fields["own_cores"])}
