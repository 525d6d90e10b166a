"""The events of a journal in MLflow: metrics, tags, parameters and the status of a run.

Which field is a metric or a tag is declared by the classes in `events.py`. Events come as the
journal's JSON, so that those of another version are delivered as far as they are understood.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.track import events
from pipeline.track.events import Tag, kind_of, uses
from pipeline.track.journal import Record, number

if TYPE_CHECKING:
    from mlflow.entities import Metric

CHECKPOINT_TAG = "spiketrain.checkpoint"
"""the URI of a run's newest checkpoint"""


class Translation:
    """Translates one run's events, in the journal's order. The first value of a step counts.

    MLflow takes no second value of a step. So an evaluation or a fidelity measurement waits for a
    checkpoint at its step or later, or for the run to finish or diverge. Until then the run may
    fail, stop, or find that the ranks' weights differ, go back and measure again. Training metrics
    of batches that are rolled back are sent and stay; a tag names their steps.

    `held` has the newest step of each metric that MLflow had before; `already_there` counts the
    points that were left out for it.
    """

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.already_there = 0
        self._seen: dict[str, int] = {}  # metric -> newest step read from the journal
        self._step = 0  # newest step of any event
        self._waiting: dict[tuple[str, int], Record] = {}  # newest of each kind and step
        self._counts: Counter[str] = Counter()
        self._rolled_back: list[str] = []
        self._of_ends: set[str] = set()  # tags of ended attempts, which the next start empties

    def points(self, event: Record) -> Iterator[Metric]:
        """The new metrics to send with this event: its own, or those that waited for it."""
        kind = kind_of(event)
        step = _integer(event.get("step"), _integer(event.get("steps"), self._step))
        if kind is not events.System:  # its steps count samples
            self._step = step
        if kind.measures_weights:
            self._waiting[kind.kind, step] = event
            return
        if kind is events.Start:
            self._waiting = {key: each for key, each in self._waiting.items() if key[1] <= step}
        elif kind.settles_weights:
            settled = sorted(
                (key for key in self._waiting if key[1] <= step), key=lambda key: key[1]
            )
            for key in settled:
                yield from self._new(self._waiting.pop(key), key[1])
        yield from self._new(event, step)

    def _new(self, event: Record, step: int) -> Iterator[Metric]:
        from mlflow.entities import Metric

        for key, value in _metrics(event):
            newest = self._seen.get(key, -1)
            if step <= newest:
                continue  # a step that is done again after a rollback
            self._seen[key] = step
            if step <= self.held.get(key, -1):
                self.already_there += 1
            else:
                yield Metric(key, value, milliseconds(event), step)

    def tags(self, event: Record) -> dict[str, str]:
        """The tags to set with this event."""
        kind = kind_of(event)
        tags = dict(kind.fixed_tags)
        for tag, value in uses(event, Tag):
            tags = _tags(tag, value) | tags  # the recipe's fields are last and replace none
        if kind is events.Start:
            return dict.fromkeys(self._of_ends, "") | tags
        if kind.state is not None:
            self._of_ends |= tags.keys()
        if kind is events.Checkpoint and event.get("path"):
            address = str(event["path"])
            uri = address if "://" in address else Path(address).absolute().as_uri()
            tags[CHECKPOINT_TAG] = uri
        if name := kind.count_tag:
            of = kind.counted_field
            self._counts[name] += _integer(event.get(of), 0) if of else 1
            tags[name] = str(self._counts[name])
        if kind is events.Rollback:
            # The steps whose training metrics are of batches that were rolled back.
            first, last = _integer(event.get("to"), 0) + 1, _integer(event.get("step"), 0) + 1
            self._rolled_back.append(f"{first}-{last}")
            tags["spiketrain.rolled_back"] = ", ".join(self._rolled_back)
        return tags


def parameters(event: Record) -> dict[str, str]:
    """The recipe's values, from the start of an attempt."""
    if kind_of(event) is not events.Start:
        return {}
    return {_key(key): str(value)[:6000] for key, value in event.get("params", {}).items()}


def milliseconds(event: Record) -> int:
    time = event.get("time", 0)
    return int(time * 1000) if isinstance(time, (int, float)) and math.isfinite(time) else 0


def _tags(tag: Tag, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        return {} if value is None else {tag.name: str(value)}
    keys = value if tag.keys is None else [key for key in tag.keys if key in value]
    return {f"{tag.name}.{_key(key)}": str(value[key]) for key in keys}


def _metrics(event: Record) -> Iterator[tuple[str, float]]:
    for metric, value in uses(event, events.Metric):
        yield from _numbers(metric.name, value, without=metric.without)


def _numbers(
    name: str, value: Any, *, without: Collection[str] = ()
) -> Iterator[tuple[str, float]]:
    """`operations.forward.additions` of a summary is `summary/operations/forward/additions`."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key not in without:
                yield from _numbers(f"{name}/{key}", item)
    elif (found := number(value)) is not None:
        yield _key(name), found


def _integer(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


def _key(name: str) -> str:
    """MLflow takes letters, digits and `_-. :/` in names, 250 characters."""
    return re.sub(r"[^\w\-. :/]", "_", str(name))[:250]
