"""Real processes for tests: gloo ranks that run one function."""

import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, multiprocessing

from tests.helpers.waiting import end_with_parent


def run_ranks(work: Callable[..., Any], ranks: int, folder: Path, *args: Any) -> list[Any]:
    """`work(rank, ranks, *args)` in as many new processes joined by gloo; what each returned, by
    rank.

    They are forked by one that has imported what they need, which would take each of them 3 s, and
    does nothing else."""
    get_context("forkserver").set_forkserver_preload(["tests.helpers.imported"])
    about = work, ranks, str(folder), args, dict(os.environ)
    multiprocessing.start_processes(_rank, about, nprocs=ranks, start_method="forkserver")
    return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(ranks)]


def refusal(act: Callable[..., object], *args: Any, of: type[Exception] = ValueError) -> str:
    """What an act of one rank is refused with; "" if it is not."""
    try:
        act(*args)
    except of as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _rank(
    rank: int,
    work: Callable[..., Any],
    ranks: int,
    folder: str,
    args: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    # as processes of their own are: what somebody draws unseeded differs between ranks
    np.random.seed()  # noqa: NPY002
    os.environ.clear()  # of the test, and not of when the first ranks were started
    os.environ.update(environment)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)})
    store = distributed.FileStore(f"{folder}/rendezvous", ranks)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        result = work(rank, ranks, *args)
    except Exception:
        traceback.print_exc()  # torch reports one rank's error; the others' would be lost
        raise
    torch.save(result, f"{folder}/result{rank}.pt")
    distributed.barrier()  # every result is there
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the end of the interpreter, where threads of gloo can outlive the groups that they
    # belong to (torch 2.13): a rank was seen to abort there ("terminate called without an active
    # exception") with its work done.
    os._exit(0)
