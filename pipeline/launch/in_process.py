"""One worker in this process, without Ray (`--inline`), for debugging."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Self

import torch

from pipeline.core.cpu_affinity import cores_here
from pipeline.core.torch_settings import keep_freed_memory
from pipeline.launch.cluster import (
    CountOrAuto,
    Device,
    cores_and_loader_threads,
    refuse_unusable_gpus,
    workers_use_gpus,
)
from pipeline.train.backend.collectives import group_of_one
from pipeline.train.job import Job, RankInfo
from pipeline.train.worker import run


class Inline:
    """Runs the only worker of a job in the calling thread.

    Raises:
        UserError: `device` is `gpu` without a GPU, or torch cannot use this machine's GPUs.
    """

    def __init__(self, *, device: Device = "auto", loader_threads: CountOrAuto = "auto") -> None:
        refuse_unusable_gpus(device)
        self.device = "cuda" if workers_use_gpus(device, 1, torch.cuda.device_count()) else "cpu"
        self.loader_threads: CountOrAuto = loader_threads
        self._group = ExitStack()

    def __enter__(self) -> Self:
        keep_freed_memory()  # before the thread that trains starts
        self._group.enter_context(group_of_one(self.device))
        return self

    def __exit__(self, *exc: object) -> None:
        self._group.close()

    def max_parallel_runs(self) -> int:
        return 1 if self.device == "cuda" else cores_here()

    def resume_options(self) -> list[str]:
        return ["--inline"]

    def run(self, job: Job, attempt: str) -> dict[str, Any] | None:
        del attempt
        if self.device == "cuda":
            cores, loader_threads = cores_and_loader_threads(
                [{"CPU": float(cores_here()), "GPU": float(torch.cuda.device_count())}],
                uses_gpus=True,
                loader_threads=self.loader_threads,
            )
            job = replace(job, threads=cores, loader_threads=loader_threads)
        return run(job, RankInfo(device=self.device))
