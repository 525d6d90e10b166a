"""One worker in this process, without Ray: for debugging, and where nothing else is installed."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, Self

import torch
from torch import distributed

from pipeline.cores import physical_cores
from pipeline.job import Job, Place
from pipeline.launch.base import Device, takes_gpus
from pipeline.malloc import keep_freed_memory
from pipeline.worker import run

GROUP_PATIENCE = timedelta(minutes=30)


class Inline:
    """Runs a job's only worker in the calling thread.

    The process group lives as long as the launcher, because DeepSpeed (0.19.8) keeps hold of the first one that it met.
    """

    workers = 1

    def __init__(self, *, device: Device = "auto") -> None:
        self.device = "cuda" if takes_gpus(device, 1, torch.cuda.device_count()) else "cpu"
        self._owned = False

    def __enter__(self) -> Self:
        keep_freed_memory()  # before the thread that trains
        # DeepSpeed reads all of them.
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": self.device})
        self._owned = not distributed.is_initialized()
        if self._owned:
            distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1, timeout=GROUP_PATIENCE)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._owned:
            distributed.destroy_process_group()
            self._owned = False

    def room(self) -> int:
        return 1 if self.device == "cuda" else len(physical_cores(os.sched_getaffinity(0)))

    def joining(self) -> list[str]:
        return ["--inline"]

    def run(self, job: Job, attempt: str) -> dict[str, Any] | None:
        del attempt
        return run(job, Place(device=self.device))
