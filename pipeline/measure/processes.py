"""Local processes that compute at the same time, and how much they slow one another down.

Cores share caches, memory and clock rates, so the speed of one worker alone is too high an estimate
for several. To measure contention, every process computes the same piece of work (a convolution,
and element-wise passes over its output, which is larger than a core's own cache) and then sums with
the others, as training does: a few numbers first (train/guards/anomaly.py), and then as many as
there are gradients. Sums use gloo on cores and nccl on GPUs, one GPU for each process.
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

from pipeline.measure.clock import seconds_of, synchronize

# Rounds of one process alone and then all together, so that a machine that slows down meanwhile
# does so for both.
ROUNDS = 5
TURNS = 10  # in a round
UNTIMED = 3  # turns that warm up


@dataclass(frozen=True)
class Contention:
    """Processes that compute together, compared with one that computes while the others wait."""

    slowdown: float  # of the same work, at least 1
    word_s: float  # seconds of a sum of a few numbers, with the wait for the slowest process
    ring_s: float  # seconds of a sum of many numbers right after it


NO_CONTENTION = Contention(1.0, 0.0, 0.0)


def measure_contention(
    workers: int, size: int, *, threads: int = 1, on: Literal["cpu", "cuda"]
) -> Contention:
    """Measure `workers` processes of `threads` threads that sum `size` bytes.

    With "cuda" each process has a GPU of its own. One worker has `NO_CONTENTION`.
    """
    if workers == 1:
        return NO_CONTENTION
    found = run_processes("plan", _seconds, size, threads, processes=workers, on=on)
    return Contention(
        slowdown=max(1.0, statistics.mean(each["together"] for each in found) / found[0]["alone"]),
        word_s=statistics.mean(each["word"] for each in found),
        ring_s=statistics.mean(each["ring"] for each in found),
    )


def _seconds(device: torch.device, size: int, threads: int) -> dict[str, float]:
    """Mean seconds of the work alone (on rank 0), of the work together, and of both sums."""
    torch.set_num_threads(threads)
    word = torch.ones(3, device=device)
    gradients = torch.ones(max(1, size // 4), device=device)
    work = _work(device)
    seconds = {name: list[float]() for name in ("alone", "together", "word", "ring")}

    def seconds_of_sum(numbers: Tensor) -> float:
        return seconds_of(lambda: distributed.all_reduce(numbers), device)

    for _ in range(ROUNDS):
        wait_for_all(device)
        if distributed.get_rank() == 0:  # the others wait at the barrier without computing
            seconds["alone"] += [next(work) for _ in range(TURNS)][UNTIMED:]
        wait_for_all(device)
        turns = [
            (next(work), seconds_of_sum(word), seconds_of_sum(gradients)) for _ in range(TURNS)
        ][UNTIMED:]
        for name, of_turns in zip(
            ("together", "word", "ring"), zip(*turns, strict=True), strict=True
        ):
            seconds[name] += of_turns
    # Means rather than medians: a delayed batch delays training, however rare it is.
    return {name: statistics.mean(each) for name, each in seconds.items() if each}


def _work(device: torch.device) -> Iterator[float]:
    """Yield the seconds of one piece of work after another."""
    convolution = nn.Conv2d(32, 32, 3, padding=1, device=device)
    x_B = torch.rand(32, 32, 28, 28, device=device)

    def piece() -> None:
        u_B = convolution(x_B)
        spikes_B = (u_B * 0.5 + x_B >= 0.5).to(u_B.dtype)
        (spikes_B * u_B).sum().backward()

    while True:
        yield seconds_of(piece, device)


def run_processes(
    who: str,
    work: Callable[..., object],
    *arguments: object,
    processes: int,
    on: Literal["cpu", "cuda"] = "cpu",
) -> list[Any]:
    """Run `work(device, *arguments)` in new processes; return its results in the order of ranks.

    Args:
        who: begins the message of an error.
        work: a function at the top of a module. Its result must be serialisable as JSON. All
            processes share torch's process group, and the environment variables of a launch (RANK,
            LOCAL_RANK, WORLD_SIZE) are set.
        on: "cpu" uses gloo; "cuda" uses nccl and one GPU for each process.

    Raises:
        ValueError: a process failed; the message is its last line. The others are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            multiprocessing.spawn(_rank, (processes, work, arguments, on, folder), nprocs=processes)
        except (
            multiprocessing.ProcessRaisedException,
            multiprocessing.ProcessExitedException,
        ) as error:
            raise ValueError(f"{who}: {str(error).strip().splitlines()[-1]}") from error
        return [json.loads(_result_of(folder, rank).read_text()) for rank in range(processes)]


def wait_for_all(device: torch.device) -> None:
    """Wait at a barrier for all other processes."""
    distributed.barrier()
    synchronize(device)  # a barrier on a GPU is a kernel, for which the host does not wait


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
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ["DS_ACCELERATOR"] = on  # DeepSpeed reads it
    distributed.init_process_group(
        {"cpu": "gloo", "cuda": "nccl"}[on],
        store=distributed.FileStore(f"{folder}/rendezvous", processes),
        rank=rank,
        world_size=processes,
    )
    _result_of(folder, rank).write_text(json.dumps(work(device, *arguments)))
    wait_for_all(device)
    distributed.destroy_process_group()


def _result_of(folder: str, rank: int) -> Path:
    return Path(folder) / f"{rank}.json"
