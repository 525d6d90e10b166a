"""Whether ranks still hold alike what they should: a copy that has drifted, by a fault of memory or
of a collective, is told.
"""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.train.backend.collectives import Ranks

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROW = 4096
"""values of a row: so many, and as many as there are rows, are hashed in place of all of them"""


def fingerprint(values: Iterable[Tensor]) -> str:
    """Of the bits of all of them, where each stands; a device is asked once.

    Each is laid out in rows and taken for integers, whose sums no order of summing changes. A bit
    that flips changes the sum of its column, two values that change places change those of their
    columns, or in one column those of their rows. The sums are hashed, and what fills no row as it
    is.
    """
    found: dict[torch.device, list[Tensor]] = {}
    for value in values:
        bits = value.detach().contiguous().view(_INTEGERS[value.element_size()]).flatten()
        rows_RC, rest = (
            bits[: len(bits) // _ROW * _ROW].view(-1, _ROW),
            bits[len(bits) // _ROW * _ROW :],
        )
        sums = (
            rows_RC.sum(0, dtype=bits.dtype),
            rows_RC.sum(1, dtype=bits.dtype),
        )  # in their own width: nothing is copied
        found.setdefault(bits.device, []).extend(part.view(torch.uint8) for part in (*sums, rest))
    hashed = hashlib.blake2b(digest_size=16)
    for parts in found.values():
        hashed.update(torch.cat(parts).cpu().numpy().tobytes())
    return hashed.hexdigest()


def drifted(values: Iterable[Tensor], ranks: Ranks) -> list[int]:
    """The ranks whose values are not those of the most; on every rank alike. Collective. One alone
    has nobody to differ from.
    """
    if ranks.size == 1:
        return []
    mine = fingerprint(values)
    found = ranks.all_gather_object(mine)
    usual, _ = Counter(found).most_common(1)[0]
    return [rank for rank, value in enumerate(found) if value != usual]


def stragglers(busy_s: float, ranks: Ranks, *, beyond: float = 1.5) -> dict[int, float]:
    """The ranks that are busy for more than `beyond` times the usual, with how many times;
    collective.

    Usual is the median of all, of two ranks that of the faster.
    """
    found = ranks.all_gather_object(busy_s)
    usual = statistics.median_low(found)
    return {
        rank: value / usual
        for rank, value in enumerate(found)
        if usual > 0 and value > beyond * usual
    }
