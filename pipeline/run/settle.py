"""How torch computes in a worker: so many threads, the same bits after a restart, on memory that it keeps."""

from __future__ import annotations

import torch

from pipeline.malloc import keep_freed_memory


def settle(threads: int) -> None:
    torch.set_num_threads(threads)
    keep_freed_memory()
    torch.backends.cudnn.deterministic = True  # costs speed where cuDNN has a faster kernel
