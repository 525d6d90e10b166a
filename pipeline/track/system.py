"""What the machine does while a run trains there: MLflow's own system metrics, sampled by the driver.

They are values of the whole machine that the driver runs on, of everybody's processes and of all its cards, and of no other
machine; what a run itself takes is measured by its workers (`pipeline.measure`).

MLflow's monitor (3.17.2) writes to the store from its own thread, ends for good at the first answer that fails, and counts its
steps by what the store holds. So its metrics alone are taken: samples are appended to `RUN/system.jsonl`, from where they are
delivered like everything else, with the time of the sample; after a resume the count of steps goes on with the file's.
"""

from __future__ import annotations

import os
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.track.jsonl import Journal, last

if TYPE_CHECKING:
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

FILE = "system.jsonl"
INTERVAL_S = 10.0


class Sampler:
    """Appends a sample every `interval` seconds from a daemon thread, until `close`; nothing is raised to its owner.

    As in MLflow, MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false switches it off, and MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL is
    the interval. One driver at a time samples a run: it holds `driver.lock`.
    """

    def __init__(self, run_dir: Path, *, interval: float | None = None) -> None:
        self._file = run_dir / FILE
        self._interval = interval or _seconds(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL")) or INTERVAL_S
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="system-metrics", daemon=True)
        if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() not in ("false", "0"):
            self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _sample(self) -> None:
        if self._closing.wait(self._interval):  # a run that is over by then imports nothing for it
            return
        try:
            monitors = _monitors()
            newest = last(self._file, "system")
            step = 0 if newest is None else int(newest["step"]) + 1
            with Journal(self._file, attempt=0) as samples:
                while not self._closing.wait(self._interval):
                    samples.event("system", step=step, metrics=_collect(monitors))
                    step += 1
        except Exception as error:  # a full disk, a driver of a card that went away: the run goes on without
            warnings.warn(f"system metrics are no longer sampled: {type(error).__name__}: {error}", stacklevel=1)


def _monitors() -> list[BaseMetricsMonitor]:
    """Of processors, memory, disk and network, and of cards where there are some."""
    import psutil
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    psutil.cpu_percent()  # the first call of a process answers 0, the next ones the mean since the call before
    monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(RuntimeError):  # no card
        monitors.append(GPUMonitor())
    return monitors


def _collect(monitors: list[BaseMetricsMonitor]) -> dict[str, float]:
    values: dict[str, float] = {}
    for monitor in monitors:
        monitor.collect_metrics()
        values.update(monitor.aggregate_metrics() or {})
        monitor.clear_metrics()
    return values


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.1, float(text)) if text else None
    except ValueError:
        return None
