"""A run for Prometheus: what its journal says, in the text format that node_exporter's textfile collector reads.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.track.jsonl import Event, number, read

STATES = ("running", "finished", "stopped", "failed", "diverged")
_STATE_OF = {"start": "running", "finish": "finished", "stopped": "stopped", "failed": "failed", "diverged": "diverged"}

# name -> what it tells, and the event and field that it is read from
_GAUGES: Mapping[str, tuple[str, str, str]] = {
    "spiketrain_images_per_second": ("Samples that all workers train per second.", "step", "images_per_s"),
    "spiketrain_loss": ("Training loss, the mean since the step event before.", "step", "loss"),
    "spiketrain_top1_ratio": ("Top-1 accuracy on what was trained since the step event before.", "step", "top1"),
    "spiketrain_learning_rate": ("Learning rate of the first parameter group.", "step", "lr"),
    "spiketrain_step_seconds": ("Seconds of a global batch, on rank 0.", "step", "step_s"),
    "spiketrain_data_wait_seconds": ("Seconds of a global batch that rank 0 waited for the loader.", "step", "data_wait_s"),
    "spiketrain_memory_bytes": ("What rank 0 holds: on its GPU, resident where it has none.", "step", "memory_bytes"),
    "spiketrain_evaluation_top1_ratio": ("Top-1 accuracy of the newest evaluation.", "evaluation", "top1"),
    "spiketrain_evaluation_loss": ("Loss of the newest evaluation.", "evaluation", "loss"),
    "spiketrain_firing_rate": ("Spikes per neuron and time step in the newest evaluation.", "evaluation", "firing_rate"),
    "spiketrain_total_steps": ("Global batches of the whole run.", "start", "total_steps"),
    "spiketrain_workers": ("Workers that train together.", "start", "world_size"),
    "spiketrain_checkpoint_step": ("Global batches done at the newest checkpoint.", "checkpoint", "step"),
    "spiketrain_checkpoint_timestamp_seconds": ("When the newest checkpoint was whole, in Unix time.", "checkpoint", "time"),
    "spiketrain_checkpoint_seconds": ("Seconds that the newest checkpoint was written for.", "checkpoint", "write_s"),
}
_LABELS = {"run": "run", "recipe": "recipe", "rule": "rule"}


def newest(events: Iterable[Event]) -> list[Event]:
    """The last event of each kind, oldest first: all that `exposition` looks at. A journal may be long, this is not.

    `newest([*newest(earlier), *later])` is `newest([*earlier, *later])`.
    """
    found: dict[str, Event] = {}
    for event in events:
        found.pop(event["event"], None)
        found[event["event"]] = event
    return list(found.values())


def exposition(events: Iterable[Event]) -> str:
    """The text for one run, from its journal's events or the `newest` of them; empty before its first attempt has begun."""
    kept = newest(events)
    of_kind = {event["event"]: event for event in kept}
    start = of_kind.get("start")
    if start is None:
        return ""
    labels = {label: str(start.get(field, "")) for label, field in _LABELS.items()}
    families = [_family(name, help_, "gauge", [(labels, value)]) for name, help_, value in _gauges(of_kind)]
    # Attempts are counted from 0, over the whole run: a counter, which Prometheus' increase() may be asked of.
    restarts = number(start.get("attempt")) or 0.0
    families.append(_family("spiketrain_restarts_total", "Attempts after the first.", "counter", [(labels, restarts)]))
    state = next(_STATE_OF[event["event"]] for event in reversed(kept) if event["event"] in _STATE_OF)
    states = [({**labels, "state": each}, float(each == state)) for each in STATES]
    families.append(_family("spiketrain_state", "1 for the state that the run is in.", "gauge", states))
    return "".join(families)


class Exposed:
    """The file of one run in the folder that SPIKETRAIN_METRICS names; without that variable nothing is written.

    Raises:
        ValueError: there is no such folder.
    """

    def __init__(self, run: Path, say: Callable[[str], None]) -> None:
        folder = os.environ.get("SPIKETRAIN_METRICS")
        if folder and not Path(folder).is_dir():
            raise ValueError(f"metrics: SPIKETRAIN_METRICS must be a folder that is there; got {folder}")
        self._file = Path(folder) / f"{run.name}.prom" if folder else None
        self._say = say
        journal = run / "journal.jsonl"
        self._newest = newest(read(journal)) if self._file and journal.exists() else []

    def show(self, events: Sequence[Event]) -> None:
        """Write what follows from more of the journal. Where the folder refuses it, that is said once, and training goes on."""
        if self._file is None or not events:
            return
        self._newest = newest([*self._newest, *events])
        try:
            write_exposition(self._file, exposition(self._newest))
        except OSError as error:
            self._say(f"metrics: {self._file} cannot be written ({error.strerror}); the run goes on without")
            self._file = None


def write_exposition(path: Path, text: str) -> None:
    """Replace `path` at once, so that a scrape never meets half a file. The collector reads names that end in .prom.

    Raises:
        ValueError: another ending.
        OSError: the folder is not there, or not to be written in.
    """
    if path.suffix != ".prom":
        raise ValueError(f"exposition: the file's name must end in .prom; got {path.name}")
    hidden = path.with_name(f".{path.name}.{os.getpid()}")  # on the same file system, and of no name that is read
    try:
        hidden.write_text(text)
        hidden.chmod(0o644)  # whatever the umask: the collector is another user
        hidden.replace(path)
    except OSError:
        hidden.unlink(missing_ok=True)
        raise


def _gauges(of_kind: Mapping[str, Event]) -> Iterator[tuple[str, str, float]]:
    for name, (help_, kind, field) in _GAUGES.items():
        event = of_kind.get(kind)
        if event is None:
            continue
        metrics: Mapping[str, Any] = event.get("metrics") or {}
        value = number(metrics.get(field, event.get(field)))
        if value is not None:
            yield name, help_, value
    # Of the newest event that says where the run stands: after a rollback that is fewer.
    for event in reversed(list(of_kind.values())):
        if (step := number(event.get("step"))) is not None:
            yield "spiketrain_step", "Global batches done.", step
            break
    times = [time for event in of_kind.values() if (time := number(event.get("time"))) is not None]
    if times:
        yield "spiketrain_event_timestamp_seconds", "When the newest event was written, in Unix time.", max(times)


def _family(name: str, help_: str, kind: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> str:
    lines = [f"# HELP {name} {help_}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        lines.append(f"{name}{{{inside}}} {_written(value)}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _written(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)
