"""Batches of a loader, for tests of data sets."""

from typing import Any

import torch

from pipeline.data.base import Batch


def read(loader: Any, epoch: int = 0, start: int = 0) -> list[Batch]:
    with loader.epoch(epoch, start=start) as batches:
        return list(batches)


def by_index(batches: list[Batch]) -> dict[int, torch.Tensor]:
    """`x` of each sample, by its place in the file, in the order of use."""
    return {int(i): x for batch in batches for i, x in zip(batch.index, batch.x, strict=True)}


def same(one: list[Batch], other: list[Batch]) -> bool:
    """Whether the batches are the same to the bit."""
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(one, other, strict=True)
        for name in ("x", "target", "index")
    )
