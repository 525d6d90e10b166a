"""What processes of one machine do to one another: each computes slower where all compute, and a sum waits for the slowest.

Cores share caches, memory and clock rates, so what one worker is seen to need alone is too little for several. Every process
computes the same piece (a convolution, and passes over what it gives, larger than a core's own cache) and then sums a tensor with
the others over gloo, as a batch of training does.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed, multiprocessing, nn

ROUNDS = 5
"""of one alone and then all together, so that a machine that gets slower in between does so for both"""
TURNS = 10
UNTIMED = 3  # of each


@dataclass(frozen=True)
class Neighbours:
    """Of so many processes that compute at once, against one that computes while the others wait."""

    slowdown: float
    """seconds of computing the same, at least 1"""
    ring_s: float
    """seconds of a sum, with the wait for the slowest"""


ALONE = Neighbours(1.0, 0.0)


def neighbours(workers: int, size: int, *, threads: int = 1) -> Neighbours:
    """Of `workers` processes of `threads` threads that sum `size` bytes; `ALONE` for one."""
    if workers == 1:
        return ALONE
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (workers, size, threads, folder), nprocs=workers)
        told = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(workers)]
    return Neighbours(
        slowdown=max(1.0, statistics.mean(each["together"] for each in told) / told[0]["alone"]),
        ring_s=statistics.mean(each["ring"] for each in told),
    )


def _rank(rank: int, workers: int, size: int, threads: int, folder: str) -> None:
    torch.set_num_threads(threads)
    store = distributed.FileStore(f"{folder}/rendezvous", workers)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=workers)
    summed, work = torch.ones(max(1, size // 4)), _work()
    alone, together, ring = list[float](), list[float](), list[float]()
    for _ in range(ROUNDS):
        distributed.barrier()
        if rank == 0:  # the others wait for it at the barrier, which is a wait without computing
            alone += [next(work) for _ in range(TURNS)][UNTIMED:]
        distributed.barrier()
        turns = [(next(work), _sum(summed)) for _ in range(TURNS)][UNTIMED:]
        together += [computing for computing, _ in turns]
        ring += [summing for _, summing in turns]
    # Means: a batch that is held up holds up a training, however rare it is.
    seconds = {"together": statistics.mean(together), "ring": statistics.mean(ring)}
    if rank == 0:
        seconds["alone"] = statistics.mean(alone)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(seconds))
    distributed.barrier()
    distributed.destroy_process_group()


def _sum(tensor: Tensor) -> float:
    begun = time.perf_counter()
    distributed.all_reduce(tensor)
    return time.perf_counter() - begun


def _work() -> Iterator[float]:
    """The seconds of one piece after the other."""
    convolution, x_B = nn.Conv2d(32, 32, 3, padding=1), torch.rand(32, 32, 28, 28)

    def piece() -> Tensor:
        u_B = convolution(x_B)
        spikes_B = (u_B * 0.5 + x_B >= 0.5).to(u_B.dtype)
        return (spikes_B * u_B).sum()

    while True:
        begun = time.perf_counter()
        piece().backward()
        yield time.perf_counter() - begun
