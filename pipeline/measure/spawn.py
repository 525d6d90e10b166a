"""Processes of this machine that compute at once, and what each of them tells."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed, multiprocessing

from pipeline.measure.stopwatch import settle


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
