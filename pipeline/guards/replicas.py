"""Whether ranks still hold alike what they should: a copy that has drifted, by a fault of memory or of a collective, is told."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.ranks import Ranks

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PERIOD = 65_521  # a prime, so that what changes places shows


def fingerprint(values: Iterable[Tensor]) -> int:
    """Of the bits of all of them, where each stands: sums of integers, which no order of summing changes."""
    total = torch.zeros((), dtype=torch.int64)
    for index, value in enumerate(values):
        bits = value.detach().contiguous().view(_INTEGERS[value.element_size()]).flatten().to(torch.int64)
        # Odd: modulo 2^64 an even one loses the highest bit. (Two values that differ in it alone may change places.)
        places = 2 * (torch.arange(len(bits), device=bits.device) % _PERIOD + index) + 1
        total += (bits * places).sum().cpu()
    return int(total)


def drifted(values: Iterable[Tensor], ranks: Ranks) -> list[int]:
    """The ranks whose values are not those of the most; on every rank alike. Collective."""
    mine = fingerprint(values)
    found = ranks.each(mine)
    usual, _ = Counter(found).most_common(1)[0]
    return [rank for rank, value in enumerate(found) if value != usual]


def stragglers(busy_s: float, ranks: Ranks, *, beyond: float = 1.5) -> dict[int, float]:
    """The ranks that are busy for more than `beyond` times the usual, with how many times; collective.

    Usual is the median of all, of two ranks that of the faster.
    """
    found = ranks.each(busy_s)
    usual = statistics.median_low(found)
    return {rank: value / usual for rank, value in enumerate(found) if usual > 0 and value > beyond * usual}
