"""The state of a run for Prometheus, in a file that node_exporter's textfile collector reads.

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
    """The last event of each kind, oldest first. `exposition` needs no other events.

    `newest([*newest(earlier), *later])` is `newest([*earlier, *later])`.
    """
    latest: dict[str, Record] = {}
    for event in events:
        latest.pop(event[KIND], None)
        latest[event[KIND]] = event
    return list(latest.values())


def exposition(events: Iterable[Record]) -> str:
    """The text for one run, from all its events or the `newest`; empty without a start event."""
    return generate_latest(_Run(newest(events))).decode()


@dataclass(frozen=True)
class _Run(Collector):
    events: Sequence[Record]  # the `newest` of the run's journal

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
        # of the newest event; a rollback lowers it
        yield _gauge("spiketrain_step", "Global batches done.", steps[-1], labels)
        yield _gauge(
            "spiketrain_event_timestamp_seconds",
            "When the newest event was written, in Unix time.",
            max(event["time"] for event in self.events),
            labels,
        )
        # A counter over the whole run, so that increase() works in Prometheus.
        restarts = CounterMetricFamily(
            "spiketrain_restarts_total", "Attempts after the first.", labels=_LABELS
        )
        restarts.add_metric(labels, number(start.get("attempt")) or 0.0)
        yield restarts
        last = next(kind for event in reversed(self.events) if (kind := kind_of(event)).state)
        current = "running" if last is Start else last.state
        states = GaugeMetricFamily(
            "spiketrain_state", "1 for the state that the run is in.", labels=(*_LABELS, "state")
        )
        for state in STATES:
            states.add_metric([*labels, state], float(state == current))
        yield states


def _gauge(name: str, help_: str, value: float, labels: Sequence[str]) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, help_, labels=_LABELS)
    gauge.add_metric(labels, value)
    return gauge


class Exposed:
    """Keeps the file of one run up to date, in the folder that SPIKETRAIN_METRICS names.

    Nothing is written if the variable is not set.

    Raises:
        ValueError: there is no such folder.
    """

    def __init__(self, run: Path, say: Callable[[str], None]) -> None:
        folder = os.environ.get("SPIKETRAIN_METRICS")
        require(
            not folder or Path(folder).is_dir(),
            f"metrics: SPIKETRAIN_METRICS must be a folder that is there; got {folder}",
        )
        self._file = Path(folder) / f"{run.name}.prom" if folder else None
        self._say = say
        self._newest = newest(read(RunFolder(run).journal)) if self._file else []

    def show(self, events: Sequence[Record]) -> None:
        """Rewrite the file with new events. An error of the folder is printed once."""
        if self._file is None or not events:
            return
        self._newest = newest([*self._newest, *events])
        # The collector reads *.prom.
        hidden = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        try:
            hidden.write_text(exposition(self._newest), encoding="utf-8")
            hidden.chmod(0o644)  # whatever the umask: the collector is another user
            hidden.replace(self._file)
        except OSError as error:
            self._say(
                f"metrics: {self._file} cannot be written ({error.strerror}); the run goes on"
                " without"
            )
            self._file = None
