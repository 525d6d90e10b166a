"""System metrics of the driver's machine while a run trains, from MLflow's own monitors.

They include all processes and all GPUs of that machine. The workers measure the use of the run
itself (`pipeline.measure`).

MLflow's monitoring thread (3.17.2) writes to the store itself, ends for good at the first failed
request, and takes its step count from the store. So only its monitors are used. Samples are
appended to `RUN/system.jsonl` and delivered like other events, with the time of the sample. After a
resume the step count continues from the file.
"""

import os
import threading
import warnings
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from pipeline.core.run_folder import RunFolder
from pipeline.track.events import System
from pipeline.track.journal import Journal, last_event

INTERVAL_S = 10.0


class Sampler:
    """Appends a sample every `interval` seconds from a daemon thread, until `close`; raises
    nothing.

    As in MLflow, MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false disables it, and
    MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL is the interval in seconds. Only the driver that holds
    `driver.lock` samples the run.
    """

    def __init__(self, run_dir: Path, *, interval: float | None = None) -> None:
        self._file = RunFolder(run_dir).system
        self._interval = interval
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="system-metrics", daemon=True)
        enabled = os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower()
        if enabled not in ("false", "0"):
            self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _sample(self) -> None:
        try:
            asked = os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or INTERVAL_S
            interval = self._interval or max(0.1, float(asked))
            if self._closing.wait(interval):  # a short run imports nothing
                return
            import psutil
            from mlflow.system_metrics.metrics import (
                cpu_monitor,
                disk_monitor,
                gpu_monitor,
                network_monitor,
            )

            # The first call returns 0, later calls return the mean since the previous call.
            psutil.cpu_percent()
            monitors: list[Any] = [
                cpu_monitor.CPUMonitor(),
                disk_monitor.DiskMonitor(),
                network_monitor.NetworkMonitor(),
            ]
            with suppress(RuntimeError):  # no card
                monitors.append(gpu_monitor.GPUMonitor())
            newest = last_event(self._file, System)
            with Journal(self._file, attempt=0) as samples:
                for step in count(0 if newest is None else newest.step + 1):
                    if self._closing.wait(interval):
                        return
                    metrics: dict[str, float] = {}
                    for monitor in monitors:
                        monitor.collect_metrics()
                        metrics |= monitor.aggregate_metrics() or {}
                        monitor.clear_metrics()
                    samples.write(System(step=step, metrics=metrics))
        except Exception as error:  # such as a full disk, or a failed GPU driver
            warnings.warn(
                f"system metrics are no longer sampled: {type(error).__name__}: {error}",
                stacklevel=1,
            )
