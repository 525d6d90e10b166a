"""Finds ranks whose values differ, after a fault of memory or of a collective, and slow ranks."""

import hashlib
import statistics
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.train.backend.collectives import Ranks

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROW = 4096  # values in a row; the sums of rows and columns are hashed, not the values


def fingerprint(values: Iterable[Tensor]) -> str:
    """A hash of the bits of all values. It waits for each device once.

    The values of a tensor are laid out in rows and read as integers, whose sums do not depend on
    the order of summation. A flipped bit changes the sum of its column. Two swapped values change
    the sums of their columns, or, in one column, of their rows. The sums are hashed. The last
    values, which do not fill a row, are hashed directly.
    """
    parts_of: dict[torch.device, list[Tensor]] = {}
    for value in values:
        bits = value.detach().contiguous().view(_INTEGERS[value.element_size()]).flatten()
        whole = len(bits) // _ROW * _ROW
        rows_RC = bits[:whole].view(-1, _ROW)
        # The sums have the width of the values, so nothing is copied.
        parts = (rows_RC.sum(0, dtype=bits.dtype), rows_RC.sum(1, dtype=bits.dtype), bits[whole:])
        parts_of.setdefault(bits.device, []).extend(part.view(torch.uint8) for part in parts)
    hashed = hashlib.blake2b(digest_size=16)
    for parts in parts_of.values():
        hashed.update(torch.cat(parts).cpu().numpy().tobytes())
    return hashed.hexdigest()


def drifted(values: Iterable[Tensor], ranks: Ranks) -> list[int]:
    """The ranks whose values differ from those of most ranks. Collective."""
    if ranks.size == 1:
        return []
    fingerprints = ranks.all_gather_object(fingerprint(values))
    usual, _ = Counter(fingerprints).most_common(1)[0]
    return [rank for rank, value in enumerate(fingerprints) if value != usual]


def stragglers(busy_s: float, ranks: Ranks, *, beyond: float = 1.5) -> dict[int, float]:
    """The ranks that are busy for more than `beyond` times the median, each with its ratio to the
    median. Collective.

    The median of two ranks is the faster one.
    """
    busy_of_ranks = ranks.all_gather_object(busy_s)
    usual = statistics.median_low(busy_of_ranks)
    return {
        rank: value / usual
        for rank, value in enumerate(busy_of_ranks)
        if usual > 0 and value > beyond * usual
    }
