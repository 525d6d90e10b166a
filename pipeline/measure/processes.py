"""What processes of one machine do to one another: each computes slower where all compute, and a
sum waits for the slowest.

Cores share caches, memory and clock rates, so what one worker is seen to need alone is too little
for several. Every process computes the same piece (a convolution, and passes over what it gives,
larger than a core's own cache) and then sums with the others, as a batch of training does, first a
few numbers (train/guards/anomaly.py) and then as many as there are gradients: over gloo on cores,
over
nccl on cards, of which each process has one.

Processes of this machine that compute at once, and what each of them tells.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, distributed, multiprocessing, nn

from pipeline.measure.clock import seconds_of, settle

ROUNDS = 5
"""of one alone and then all together, so that a machine that gets slower in between does so for
both
"""
TURNS = 10
UNTIMED = 3  # of each


@dataclass(frozen=True)
class Neighbours:
    """Of so many processes that compute at once, against one that computes while the others
    wait.
    """

    slowdown: float
    """seconds of computing the same, at least 1"""
    word_s: float
    """seconds of a sum of a few numbers, with the wait for the slowest"""
    ring_s: float
    """seconds of a sum, right after that"""


ALONE = Neighbours(1.0, 0.0, 0.0)


def neighbours(
    workers: int, size: int, *, threads: int = 1, on: Literal["cpu", "cuda"]
) -> Neighbours:
    """Of `workers` processes of `threads` threads, with "cuda" on a card each, that sum `size`
    bytes; `ALONE` for one.
    """
    if workers == 1:
        return ALONE
    told = at_once("neighbours", _seconds, size, threads, processes=workers, on=on)
    return Neighbours(
        slowdown=max(1.0, statistics.mean(each["together"] for each in told) / told[0]["alone"]),
        word_s=statistics.mean(each["word"] for each in told),
        ring_s=statistics.mean(each["ring"] for each in told),
    )


def _seconds(device: torch.device, size: int, threads: int) -> dict[str, float]:
    """Of computing alone, which the first process tells, and together, and of both sums."""
    torch.set_num_threads(threads)
    word, gradients, work = (
        torch.ones(3, device=device),
        torch.ones(max(1, size // 4), device=device),
        _work(device),
    )
    seconds = {name: list[float]() for name in ("alone", "together", "word", "ring")}

    def seconds_of_sum(numbers: Tensor) -> float:
        return seconds_of(lambda: distributed.all_reduce(numbers), device)

    for _ in range(ROUNDS):
        meet(device)
        if (
            distributed.get_rank() == 0
        ):  # the others wait for it at the barrier, which is a wait without computing
            seconds["alone"] += [next(work) for _ in range(TURNS)][UNTIMED:]
        meet(device)
        turns = [
            (next(work), seconds_of_sum(word), seconds_of_sum(gradients)) for _ in range(TURNS)
        ][UNTIMED:]
        for name, of_turns in zip(
            ("together", "word", "ring"), zip(*turns, strict=True), strict=True
        ):
            seconds[name] += of_turns
    # Means: a batch that is held up holds up a training, however rare it is.
    return {name: statistics.mean(each) for name, each in seconds.items() if each}


def _work(device: torch.device) -> Iterator[float]:
    """The seconds of one piece after the other."""
    convolution, x_B = (
        nn.Conv2d(32, 32, 3, padding=1, device=device),
        torch.rand(32, 32, 28, 28, device=device),
    )

    def piece() -> None:
        u_B = convolution(x_B)
        spikes_B = (u_B * 0.5 + x_B >= 0.5).to(u_B.dtype)
        (spikes_B * u_B).sum().backward()

    while True:
        yield seconds_of(piece, device)


def at_once(
    who: str,
    work: Callable[..., object],
    *arguments: object,
    processes: int,
    on: Literal["cpu", "cuda"] = "cpu",
) -> list[Any]:
    """What `work(device, *arguments)` tells in each of so many new processes, in the order of their
    ranks, as JSON keeps it.

    work: a function of a module. Inside, torch's process group is all of them: over gloo on cores,
        over nccl with "cuda", where each has a card of its own. The environment tells each its
        place, as a launch does.

    Raises: ValueError for what the first of them ended in; the others are ended too.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            multiprocessing.spawn(_rank, (processes, work, arguments, on, folder), nprocs=processes)
        except (
            multiprocessing.ProcessRaisedException,
            multiprocessing.ProcessExitedException,
        ) as error:
            raise ValueError(f"{who}: {str(error).strip().splitlines()[-1]}") from error
        return [json.loads(_told(folder, rank).read_text()) for rank in range(processes)]


def meet(device: torch.device) -> None:
    """Wait for all the others."""
    distributed.barrier()
    settle(device)  # a card's barrier is a kernel, for which the host does not wait


def _rank(
    rank: int,
    processes: int,
    work: Callable[..., object],
    arguments: tuple[object, ...],
    on: Literal["cpu", "cuda"],
    folder: str,
) -> None:
    device = torch.device("cpu") if on == "cpu" else torch.device("cuda", rank)
    if on == "cuda":
        torch.cuda.set_device(device)
    of_this = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
    os.environ.update(
        {"DS_ACCELERATOR": on} | {name: str(place) for name, place in of_this.items()}
    )  # DeepSpeed reads them
    store = distributed.FileStore(f"{folder}/rendezvous", processes)
    distributed.init_process_group(
        {"cpu": "gloo", "cuda": "nccl"}[on], store=store, rank=rank, world_size=processes
    )
    _told(folder, rank).write_text(json.dumps(work(device, *arguments)))
    meet(device)
    distributed.destroy_process_group()


def _told(folder: str, rank: int) -> Path:
    return Path(folder) / f"{rank}.json"
