"""What the events of a journal are in MLflow: metrics, tags, parameters and the status of a run."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.recipe.recipe import Role, roles
from pipeline.track.journal import Event, number

if TYPE_CHECKING:
    from mlflow.entities import Metric

_COUNTED = {
    "quarantine": "quarantined_checkpoints",
    "unwritten": "unwritten_checkpoints",
    "undeleted": "undeleted_checkpoints",
    "skipped": "skipped_samples",
    "preempted": "preemptions",
    "rollback": "rollbacks",
}
"""kinds of events whose count is a tag; of `skipped` the count of samples"""
_OF_WEIGHTS = ("evaluation", "fidelity")
STATUS = {
    "start": "RUNNING",
    "finish": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
    "diverged": "FAILED",
}
_TAGGED = (
    "recipe",
    "rule",
    "study",
    "study_parent",
    "world_size",
    "commit",
    "dirty",
    "data_fingerprint",
    "suite",
)
"""facts of a start event that are tags; the recipe's fields of `Role.TAG` are tags, too"""


CHECKPOINT_TAG = "spiketrain.checkpoint"
"""the URI of a run's newest checkpoint"""


class Translation:
    """Translates one run's events, in the journal's order. The first value of a step counts.

    MLflow takes no second value of a step. So an evaluation or a fidelity measurement waits for a
    checkpoint at its step or later, or for the run to finish or diverge. Until then the run may
    fail,
    stop, or find that the ranks' weights differ, go back and measure again. Training metrics of
    batches that are rolled back are sent and stay; a tag names their steps.

    `held` has the newest step of each metric that MLflow had before; `already_there` counts the
    points that were left out for it.
    """

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.already_there = 0
        self._seen: dict[str, int] = {}  # metric -> newest step read from the journal
        self._step = 0  # newest step of any event
        self._waiting: dict[tuple[str, int], Event] = {}  # of each kind and step the newest
        self._counts: Counter[str] = Counter()
        self._rolled_back: list[str] = []
        self._of_ends: set[str] = set()  # tags of ended attempts, which the next start empties

    def points(self, event: Event) -> Iterator[Metric]:
        """The new metrics to send with this event: its own, or those that waited for it."""
        kind, step = (
            event["event"],
            _integer(event.get("step"), _integer(event.get("steps"), self._step)),
        )
        if kind != "system":  # its steps count samples
            self._step = step
        if kind in _OF_WEIGHTS:
            self._waiting[kind, step] = event
            return
        if kind == "start":
            self._waiting = {
                (of, at): each for (of, at), each in self._waiting.items() if at <= step
            }
        elif kind in ("checkpoint", "finish", "diverged"):
            for of, at in sorted(
                (key for key in self._waiting if key[1] <= step), key=lambda key: key[1]
            ):
                yield from self._new(self._waiting.pop((of, at)), at)
        yield from self._new(event, step)

    def _new(self, event: Event, step: int) -> Iterator[Metric]:
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

    def tags(self, event: Event) -> dict[str, str]:
        kind = event["event"]
        if kind == "start":
            facts = {**(event.get("params") or {}), **event}
            fields = [name for name, role in roles().items() if Role.TAG in role]
            tags = {
                f"spiketrain.{name}": str(facts[name])
                for name in (*_TAGGED, *fields)
                if facts.get(name) is not None
            }
            for group in ("hardware", "versions"):
                tags |= {
                    f"{group}.{_key(name)}": str(value)
                    for name, value in (event.get(group) or {}).items()
                }
            if event.get("commit"):
                tags["mlflow.source.git.commit"] = str(event["commit"])
            tags |= dict.fromkeys(self._of_ends, "")
            return tags | {
                "spiketrain.attempt": str(event.get("attempt", 0)),
                "mlflow.source.name": str(event.get("recipe", "")),
            }
        if kind == "checkpoint" and event.get("path"):
            address = str(event["path"])
            return {
                CHECKPOINT_TAG: address if "://" in address else Path(address).absolute().as_uri()
            }
        if ended := _ended(event):
            self._of_ends |= ended.keys()
            return ended
        if (name := _COUNTED.get(kind)) is not None:
            self._counts[name] += _integer(event.get("samples"), 0) if kind == "skipped" else 1
            return {
                f"spiketrain.{name}": str(self._counts[name]),
                **(self._rolled_back_steps(event) if kind == "rollback" else {}),
            }
        return {}

    def _rolled_back_steps(self, rollback: Event) -> dict[str, str]:
        """The tag with the steps whose training metrics are of batches that were rolled back."""
        self._rolled_back.append(
            f"{_integer(rollback.get('to'), 0) + 1}-{_integer(rollback.get('step'), 0) + 1}"
        )
        return {"spiketrain.rolled_back": ", ".join(self._rolled_back)}


def parameters(event: Event) -> dict[str, str]:
    """The recipe's values, from the start of an attempt."""
    if event["event"] != "start":
        return {}
    return {_key(key): str(value)[:6000] for key, value in event.get("params", {}).items()}


def milliseconds(event: Event) -> int:
    time = event.get("time", 0)
    return int(time * 1000) if isinstance(time, (int, float)) and math.isfinite(time) else 0


def _ended(event: Event) -> dict[str, str]:
    """The tags of an attempt that ended without finishing."""
    kind = event["event"]
    if kind in ("failed", "diverged"):
        return {
            "spiketrain.error": str(event.get("error", "")),
            "spiketrain.diverged": str(kind == "diverged").lower(),
        }
    if kind == "stopped":
        return {"spiketrain.stopped": str(event.get("reason", ""))}
    return {}


def _metrics(event: Event) -> Iterator[tuple[str, float]]:
    kind = event["event"]
    prefix = {
        "step": "train/",
        "evaluation": "val/",
        "epoch": "epoch/",
        "fidelity": "fidelity/",
        "checkpoint": "checkpoint/",
        "finish": "summary/",
        "system": "system/",
    }.get(kind)
    if prefix is None:
        return
    values: dict[str, Any] = dict(event.get("metrics") or {})
    if kind == "step":
        values["memory_bytes"] = event.get("memory_bytes")
    elif kind == "checkpoint":
        values |= {name: event.get(name) for name in ("stall_s", "write_s", "bytes")}
    elif kind == "fidelity":
        values |= {name: event.get(name) for name in ("temporal_share", "cosines")}
    elif kind == "finish":
        values |= {
            name: value
            for name, value in event.items()
            if name not in ("time", "attempt", "seed", "steps", "epochs")
        }
    yield from _numbers(prefix, values)


def _numbers(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """`operations.forward.additions` of a summary is `summary/operations/forward/additions`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(f"{prefix}{name}/", value)
        elif (found := number(value)) is not None:
            yield _key(prefix + name), found


def _integer(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


def _key(name: str) -> str:
    """MLflow takes letters, digits and `_-. :/` in names, 250 characters."""
    return re.sub(r"[^\w\-. :/]", "_", str(name))[:250]
