"""How fast processes on all nodes add numbers up together, as they do after every batch, and over the ports that they do it.

Workers with GPUs average their gradients over NCCL, and agree on all else over gloo (ranks.py), which has ports of its own and
may choose another interface: both have to work.
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from typing import Literal

import torch
from torch import distributed

from pipeline.ports import free_port

NUMBERS = 16 << 20
"""that are added up, in float32: 64 MiB, the gradients of a ResNet-18 and half"""
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where `size` processes meet: the first of them listens at `host` and `port`."""

    host: str
    port: int
    size: int
    backend: Literal["gloo", "nccl"]

    @property
    def patience_s(self) -> float:
        """In which all have to come: each imports torch from a storage that the others read too."""
        return 30.0 + 2.0 * self.size


def meet_here(size: int, *, backend: Literal["gloo", "nccl"], patience_s: float | None = None) -> list[float]:
    """What `meet` tells in each of `size` processes on this machine; with nccl each has a card of its own.

    Raises:
        RuntimeError: as `meet`, or one of them died.
    """
    meeting = Meeting(host="127.0.0.1", port=free_port(), size=size, backend=backend)
    with ProcessPoolExecutor(size, get_context("spawn")) as processes:  # forked ones could not use CUDA
        asked = [processes.submit(_meet_on_card, meeting, rank, patience_s) for rank in range(size)]
        return [each.result() for each in asked]  # none is without an end: they wait for one another with patience


def _meet_on_card(meeting: Meeting, rank: int, patience_s: float | None) -> float:
    if meeting.backend == "nccl":
        torch.cuda.set_device(rank)
    return meet(meeting, rank, patience_s=patience_s)


def meet(meeting: Meeting, rank: int, *, patience_s: float | None = None) -> float:
    """Bytes per second that the slowest link carries, by the median of some rounds.

    What is counted is what a ring sends over each link, 2 (n - 1) / n of the bytes: comparable with a link's speed whatever n.

    Raises:
        RuntimeError: one of them did not come in time, over gloo either, or what came out is not the sum.
    """
    patience = timedelta(seconds=meeting.patience_s if patience_s is None else patience_s)
    where = {"init_method": f"tcp://{meeting.host}:{meeting.port}", "rank": rank, "world_size": meeting.size}
    distributed.init_process_group(meeting.backend, timeout=patience, **where)
    try:
        device = "cuda" if meeting.backend == "nccl" else "cpu"
        seconds = [_add_up(rank, meeting.size, device) for _ in range(1 + ROUNDS)]
        if meeting.backend != "gloo":
            _agree(rank, meeting.size, patience)
    finally:
        distributed.destroy_process_group()
    sent = 2 * (meeting.size - 1) / meeting.size * 4 * NUMBERS
    return sent / statistics.median(seconds[1:])  # the first connects


def _agree(rank: int, size: int, patience: timedelta) -> None:
    number = torch.tensor(rank + 1)
    try:
        distributed.all_reduce(number, group=distributed.new_group(backend="gloo", timeout=patience))
    except RuntimeError as error:
        raise RuntimeError(f"over gloo, by which workers agree: {' '.join(str(error).split())}") from error
    _check_sum(size, int(number), int(number))


def _add_up(rank: int, size: int, device: str) -> float:
    numbers = torch.full((NUMBERS,), rank + 1.0, device=device)
    distributed.barrier()
    began = time.perf_counter()
    distributed.all_reduce(numbers)
    least, most = (float(each) for each in numbers.aminmax())  # waits for the device
    taken = time.perf_counter() - began
    _check_sum(size, least, most)
    return taken


def _check_sum(size: int, least: float, most: float) -> None:
    if (least, most) != (size * (size + 1) / 2,) * 2:
        raise RuntimeError(f"the sum must be {size * (size + 1) // 2} everywhere; it is {least:g} to {most:g}")
