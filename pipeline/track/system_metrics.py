"""Samples the system metrics of the driver's machine during training, with MLflow's monitors.

The metrics include all processes and all GPUs of the machine. The workers measure what the run
itself uses (`pipeline.measure`).

MLflow's monitors are called here, without MLflow's monitoring thread (3.17.2). That thread writes
to the MLflow store, reads its step count from there, and ends at the first failed request. Here,
samples are appended to `RUN/system.jsonl`, and delivered like other events with the time of the
sample. After a resume, the step count continues from the file.
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
    """Appends a sample every `interval_s` seconds from a daemon thread, until `close`. An error
    ends the sampling with a warning.

    The environment variables are those of MLflow: MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false
    disables the sampler, and MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL is the default interval in
    seconds. Only the driver that holds `driver.lock` may sample the run.
    """

    def __init__(self, run_dir: Path, *, interval_s: float | None = None) -> None:
        self._file = RunFolder(run_dir).system
        self._interval_s = interval_s
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
            default_s = os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or INTERVAL_S
            interval_s = self._interval_s or max(0.1, float(default_s))
            if self._closing.wait(interval_s):  # a short run does not import MLflow
                return
            import psutil
            from mlflow.system_metrics.metrics import (
                cpu_monitor,
                disk_monitor,
                gpu_monitor,
                network_monitor,
            )

            # The first call returns 0. A later call returns the mean since the previous call.
            psutil.cpu_percent()
            monitors: list[Any] = [
                cpu_monitor.CPUMonitor(),
                disk_monitor.DiskMonitor(),
                network_monitor.NetworkMonitor(),
            ]
            with suppress(RuntimeError):  # there is no GPU
                monitors.append(gpu_monitor.GPUMonitor())
            newest = last_event(self._file, System)
            with Journal(self._file, attempt=0) as samples:
                for step in count(0 if newest is None else newest.step + 1):
                    if self._closing.wait(interval_s):
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
