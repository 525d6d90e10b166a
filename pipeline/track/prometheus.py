"""Writes the state of a run to a file for Prometheus. The textfile collector of node_exporter reads
the file.

The classes in `events.py` declare which fields are gauges.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pipeline.core.checks import require
from pipeline.core.run_folder import RunFolder
from pipeline.track.events import KIND, KINDS, Gauge, Start, kind_of, uses
from pipeline.track.journal import Record, number, read

STATES = tuple(
    "running" if kind is Start else kind.state for kind in KINDS.values() if kind.state is not None
)
_LABELS = ("run", "recipe", "rule")


def newest(events: Iterable[Record]) -> list[Record]:
    """The last event of each kind, oldest first. `exposition` needs only these events.

    `newest([*newest(earlier), *later])` is equal to `newest([*earlier, *later])`.
    """
    by_kind: dict[str, Record] = {}
    for event in events:
        by_kind.pop(event[KIND], None)
        by_kind[event[KIND]] = event
    return list(by_kind.values())


def exposition(events: Iterable[Record]) -> str:
    """The state of one run in Prometheus's text format; empty without a start event.

    Args:
        events: all events of the run, or the `newest`.
    """
    return generate_latest(_Run(newest(events))).decode()


@dataclass(frozen=True)
class _Run(Collector):
    events: Sequence[Record]  # the `newest` events of the run

    def collect(self) -> Iterator[Metric]:
        start = next((event for event in self.events if kind_of(event) is Start), None)
        if start is None:
            return
        labels = [str(start.get(label, "")) for label in _LABELS]
        for event in self.events:
            for gauge, field in uses(event, Gauge):
                value = number((field or {}).get(gauge.key) if gauge.key else field)
                if value is not None:
                    yield _gauge(gauge.name, gauge.help, value, labels)
        steps = [event["step"] for event in self.events if "step" in event]
        # the step of the newest event, which is lower after a rollback
        yield _gauge("spiketrain_step", "Global batches done.", steps[-1], labels)
        yield _gauge(
            "spiketrain_event_timestamp_seconds",
            "Unix time at which the newest event was written.",
            max(event["time"] for event in self.events),
            labels,
        )
        # A counter of the whole run, so that Prometheus's increase() can be applied.
        restarts = CounterMetricFamily(
            "spiketrain_restarts_total", "Attempts after the first.", labels=_LABELS
        )
        restarts.add_metric(labels, number(start.get("attempt")) or 0.0)
        yield restarts
        last = next(kind for event in reversed(self.events) if (kind := kind_of(event)).state)
        current = "running" if last is Start else last.state
        states = GaugeMetricFamily(
            "spiketrain_state", "1 for the current state, else 0.", labels=(*_LABELS, "state")
        )
        for state in STATES:
            states.add_metric([*labels, state], float(state == current))
        yield states


def _gauge(name: str, help_: str, value: float, labels: Sequence[str]) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, help_, labels=_LABELS)
    gauge.add_metric(labels, value)
    return gauge


class MetricsFile:
    """The file with the state of one run, in the folder that the environment variable
    SPIKETRAIN_METRICS names. If the variable is not set, nothing is written.

    Args:
        run: the run's folder.
        print_line: prints a line for the user.

    Raises:
        ValueError: SPIKETRAIN_METRICS names no folder.
    """

    def __init__(self, run: Path, print_line: Callable[[str], None]) -> None:
        folder = os.environ.get("SPIKETRAIN_METRICS")
        require(
            not folder or Path(folder).is_dir(),
            f"metrics: SPIKETRAIN_METRICS must be an existing folder; got {folder}",
        )
        self._file = Path(folder) / f"{run.name}.prom" if folder else None
        self._print_line = print_line
        self._newest = newest(read(RunFolder(run).journal)) if self._file else []

    def show(self, events: Sequence[Record]) -> None:
        """Add events and rewrite the file. After an error, one line is printed, and the file is not
        written again.
        """
        if self._file is None or not events:
            return
        self._newest = newest([*self._newest, *events])
        # The collector reads only *.prom.
        temp = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        try:
            temp.write_text(exposition(self._newest), encoding="utf-8")
            temp.chmod(0o644)  # the collector is another user, who must be able to read the file
            temp.replace(self._file)
        except OSError as error:
            self._print_line(
                f"metrics: {self._file} cannot be written ({error.strerror}); the run continues"
                " without this file"
            )
            self._file = None
