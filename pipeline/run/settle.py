"""How torch computes in a worker: so many threads, the same bits after a restart, on memory that it
keeps.
"""

from __future__ import annotations

import os
import re
import warnings

import torch

from pipeline.malloc import keep_freed_memory

EXACT = {"NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""by which NCCL and cuBLAS take the same order of sums at every start: NVLS, trees and other
workspaces promise no order
"""

_inexact: set[str] = set()
"""operations that this process ran on a card and of which torch has no deterministic form"""


def settle(threads: int, device: torch.device) -> None:
    """Before anything is computed. What a user has set of EXACT stays; `exactness` tells of it."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    if device.type != "cuda":
        return  # torch's CPU operations that networks use are deterministic
    for name, value in EXACT.items():
        os.environ.setdefault(name, value)
    torch.backends.cudnn.deterministic = True  # costs speed where cuDNN has a faster kernel
    torch.backends.cudnn.benchmark = False
    # Warns: a network with an operation that has no such form trains all the same, and its
    # conditions name the operation.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    _note_inexact()


def exactness(device: torch.device) -> str:
    """`yes` if a restart on as many workers gives the same bits, else `no: ` and what prevents it;
    for a run's conditions.
    """
    if device.type != "cuda":
        return "yes"
    others = [
        f"{name}={os.environ.get(name)}"
        for name, value in EXACT.items()
        if os.environ.get(name) != value
    ]
    return f"no: {', '.join([*others, *sorted(_inexact)])}" if others or _inexact else "yes"


def _note_inexact() -> None:
    """Keep the names that torch (2.13) warns of: it offers them no other way."""
    show = warnings.showwarning

    def note(message: Warning | str, *about: object, **more: object) -> None:
        if found := re.match(r"(.+?) does not have a deterministic implementation", str(message)):
            _inexact.add(found[1])
        else:
            show(message, *about, **more)  # type: ignore[arg-type]

    if getattr(show, "__module__", "") != __name__:  # another run in this process has it already
        warnings.showwarning = note
