"""How long a ring of local processes takes to sum gradients: gloo on a CPU, as training does it."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed, multiprocessing

TURNS = 7


def ring_s(workers: int, size: int) -> float:
    """Seconds of an all-reduce of `size` bytes over so many processes of this machine, the median of several; 0 for one."""
    if workers == 1:
        return 0.0
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (workers, size, folder), nprocs=workers)
        return float((Path(folder) / "seconds").read_text())


def _rank(rank: int, workers: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/rendezvous", workers)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=workers)
    gradients = torch.ones(max(1, size // 4))
    seconds = []
    for _ in range(TURNS):
        distributed.barrier()
        begun = time.perf_counter()
        distributed.all_reduce(gradients)
        seconds.append(time.perf_counter() - begun)
    if rank == 0:
        (Path(folder) / "seconds").write_text(str(statistics.median(seconds[1:])))
    distributed.barrier()
    distributed.destroy_process_group()
