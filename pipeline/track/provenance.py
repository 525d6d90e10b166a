"""The conditions under which a run was trained: workers, micro-batch, machine and loaders.

A run may continue under other conditions: other workers, another machine, other loader threads,
reserved cores, or (after memory ran out) a smaller micro-batch. Times and memory peaks of such a
run belong to all of its conditions together.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.track.events import Start, kind_of

FIELDS = ("world_size", "micro_batch", "hardware", "loader_threads", "own_cores")


def trained_on(events: Sequence[Mapping[str, Any]], *, steps: int | None) -> list[dict[str, Any]]:
    """The FIELDS of each start in a journal that contributed to the result. The oldest start is
    first, and each combination of values occurs once.

    A start does not count if a later start began at the same step or earlier, because all of its
    steps were repeated. A start at the last step does not count either, unless no other start does.

    Args:
        steps: the number of steps of the finished run; None: the run is not finished, and its
            newest start always counts.
    """
    starts: list[Mapping[str, Any]] = []
    for start in (event for event in events if kind_of(event) is Start):
        starts = [*(earlier for earlier in starts if earlier["step"] < start["step"]), start]
    trained = [start for start in starts if steps is None or start["step"] < steps]
    conditions = [_fields(start) for start in trained or starts[-1:]]
    return [fields for i, fields in enumerate(conditions) if fields not in conditions[:i]]


def conditions_of(
    summary: Mapping[str, Any], events: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """The conditions of a finished run, from `trained_on` in its summary, or else from its journal.

    If neither has them, the result is the conditions at the end of the run, which are other fields
    of the summary. Values that are missing in the result are also taken from these fields.
    """
    return [
        _fields({**summary, **{name: value for name, value in fields.items() if value is not None}})
        for fields in summary.get("trained_on")
        or trained_on(events, steps=summary.get("steps"))
        or [{}]
    ]


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The FIELDS of a start or a summary. `own_cores` is True if cores are reserved."""
    fields = {name: values.get(name) for name in FIELDS}
    return {**fields, "own_cores": bool(fields["own_cores"])}
