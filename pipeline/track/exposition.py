"""The state of a run for Prometheus, in a file that node_exporter's textfile collector reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import generate_latest, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pipeline.track.journal import Event, number, read
from pipeline.track.state import ENDS

_STATE_OF: Mapping[str, str] = {**ENDS, "start": "running"}
STATES = tuple(_STATE_OF.values())

# name -> its help text, and the event and field with the value
_GAUGES: Mapping[str, tuple[str, str, str]] = {
    "spiketrain_images_per_second": (
        "Samples that all workers train per second.",
        "step",
        "images_per_s",
    ),
    "spiketrain_loss": ("Training loss, the mean since the step event before.", "step", "loss"),
    "spiketrain_top1_ratio": (
        "Top-1 accuracy on what was trained since the step event before.",
        "step",
        "top1",
    ),
    "spiketrain_learning_rate": ("Learning rate of the first parameter group.", "step", "lr"),
    "spiketrain_step_seconds": ("Seconds of a global batch, on rank 0.", "step", "step_s"),
    "spiketrain_data_wait_seconds": (
        "Seconds of a global batch that rank 0 waited for the loader.",
        "step",
        "data_wait_s",
    ),
    "spiketrain_memory_bytes": (
        "What rank 0 holds: on its GPU, resident where it has none.",
        "step",
        "memory_bytes",
    ),
    "spiketrain_evaluation_top1_ratio": (
        "Top-1 accuracy of the newest evaluation.",
        "evaluation",
        "top1",
    ),
    "spiketrain_evaluation_loss": ("Loss of the newest evaluation.", "evaluation", "loss"),
    "spiketrain_firing_rate": (
        "Spikes per neuron and time step in the newest evaluation.",
        "evaluation",
        "firing_rate",
    ),
    "spiketrain_total_steps": ("Global batches of the whole run.", "start", "total_steps"),
    "spiketrain_workers": ("Workers that train together.", "start", "world_size"),
    "spiketrain_checkpoint_step": (
        "Global batches done at the newest checkpoint.",
        "checkpoint",
        "step",
    ),
    "spiketrain_checkpoint_timestamp_seconds": (
        "When the newest checkpoint was whole, in Unix time.",
        "checkpoint",
        "time",
    ),
    "spiketrain_checkpoint_seconds": (
        "Seconds that the newest checkpoint was written for.",
        "checkpoint",
        "write_s",
    ),
}
_LABELS = ("run", "recipe", "rule")


def newest(events: Iterable[Event]) -> list[Event]:
    """The last event of each kind, oldest first: all that `exposition` needs of a long journal.

    `newest([*newest(earlier), *later])` is `newest([*earlier, *later])`.
    """
    found: dict[str, Event] = {}
    for event in events:
        found.pop(event["event"], None)
        found[event["event"]] = event
    return list(found.values())


def exposition(events: Iterable[Event]) -> str:
    """The text for one run from its events, or the `newest` of them; empty without a start."""
    return generate_latest(_Run(newest(events))).decode()


@dataclass(frozen=True)
class _Run(Collector):
    """The metrics of one run; `events` are the `newest` of its journal."""

    events: Sequence[Event]

    def collect(self) -> Iterator[Metric]:
        of_kind = {event["event"]: event for event in self.events}
        if "start" not in of_kind:
            return
        start = of_kind["start"]
        labels = [str(start.get(label, "")) for label in _LABELS]
        for name, help_, value in _gauges(of_kind):
            gauge = GaugeMetricFamily(name, help_, labels=_LABELS)
            gauge.add_metric(labels, value)
            yield gauge
        # Attempts are counted over the whole run: increase() can be asked of a counter.
        restarts = CounterMetricFamily(
            "spiketrain_restarts_total", "Attempts after the first.", labels=_LABELS
        )
        restarts.add_metric(labels, number(start.get("attempt")) or 0.0)
        yield restarts
        kind = next(kind for kind in reversed(of_kind) if kind in _STATE_OF)
        state = GaugeMetricFamily(
            "spiketrain_state", "1 for the state that the run is in.", labels=(*_LABELS, "state")
        )
        for each in STATES:
            state.add_metric([*labels, each], float(each == _STATE_OF[kind]))
        yield state


def _gauges(of_kind: dict[str, Event]) -> Iterator[tuple[str, str, float]]:
    for name, (help_, kind, field) in _GAUGES.items():
        event = of_kind.get(kind, {})
        value = number((event.get("metrics") or {}).get(field, event.get(field)))
        if value is not None:
            yield name, help_, value
    # The newest event that names a step: after a rollback it is lower than the step before.
    for event in reversed(of_kind.values()):
        if (step := number(event.get("step"))) is not None:
            yield "spiketrain_step", "Global batches done.", step
            break
    times = [time for event in of_kind.values() if (time := number(event.get("time"))) is not None]
    if times:
        help_ = "When the newest event was written, in Unix time."
        yield "spiketrain_event_timestamp_seconds", help_, max(times)


class Exposed:
    """Keeps the file of one run up to date, in the folder that SPIKETRAIN_METRICS names.

    Nothing is written where the variable is not set.

    Raises:
        ValueError: there is no such folder.
    """

    def __init__(self, run: Path, say: Callable[[str], None]) -> None:
        folder = os.environ.get("SPIKETRAIN_METRICS")
        if folder and not Path(folder).is_dir():
            raise ValueError(
                f"metrics: SPIKETRAIN_METRICS must be a folder that is there; got {folder}"
            )
        self._file = Path(folder) / f"{run.name}.prom" if folder else None
        self._say = say
        self._newest = newest(read(run / "journal.jsonl")) if self._file else []

    def show(self, events: Sequence[Event]) -> None:
        """Rewrite the file with new events. An error of the folder is said once; training goes
        on.
        """
        if self._file is None or not events:
            return
        self._newest = newest([*self._newest, *events])
        hidden = self._file.with_name(f".{self._file.name}.{os.getpid()}")  # read are *.prom
        try:
            write_to_textfile(str(hidden), _Run(self._newest))
            hidden.chmod(0o644)  # whatever the umask: the collector is another user
            hidden.replace(self._file)
        except OSError as error:
            self._say(
                f"metrics: {self._file} cannot be written ({error.strerror}); the run goes on"
                " without"
            )
            self._file = None
