"""Checks that compare ranks: slow ranks, and ranks whose values differ after a fault."""

import hashlib
import statistics
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.train.backend.collectives import Ranks

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROW = 4096  # number of values in a row


def fingerprint(values: Iterable[Tensor]) -> str:
    """A hash of all values. The CPU waits once for each device.

    The values of a tensor are read as integers and arranged in rows. The sums of rows and of
    columns are hashed, not the values. Sums of integers do not depend on the order of summation. A
    flipped bit changes the sum of its column. Two swapped values change the sums of their columns;
    in the same column, they change the sums of their rows. The last values, which do not fill a
    row, are hashed directly.
    """
    parts_by_device: dict[torch.device, list[Tensor]] = {}
    for value in values:
        bits = value.detach().contiguous().view(_INTEGERS[value.element_size()]).flatten()
        end = len(bits) // _ROW * _ROW
        rows_RC = bits[:end].view(-1, _ROW)
        # A sum in the integer type of the values needs no converted copy of them.
        parts = (rows_RC.sum(0, dtype=bits.dtype), rows_RC.sum(1, dtype=bits.dtype), bits[end:])
        parts_by_device.setdefault(bits.device, []).extend(part.view(torch.uint8) for part in parts)
    digest = hashlib.blake2b(digest_size=16)
    for parts in parts_by_device.values():
        digest.update(torch.cat(parts).cpu().numpy().tobytes())
    return digest.hexdigest()


def drifted(values: Iterable[Tensor], ranks: Ranks) -> list[int]:
    """The ranks whose values differ from those of most ranks. Collective.

    If two groups are equally large, the group with the lowest rank counts as the majority.
    """
    if ranks.size == 1:
        return []
    fingerprints = ranks.all_gather_object(fingerprint(values))
    majority, _ = Counter(fingerprints).most_common(1)[0]
    return [rank for rank, value in enumerate(fingerprints) if value != majority]


def stragglers(busy_s: float, ranks: Ranks, *, max_ratio: float = 1.5) -> dict[int, float]:
    """The slow ranks: the ratio of a rank's busy time to the median of all ranks, if it is above
    `max_ratio`. Collective.

    For an even number of ranks, the median is the shorter of the two middle times.
    """
    busy_s_by_rank = ranks.all_gather_object(busy_s)
    median_s = statistics.median_low(busy_s_by_rank)
    return {
        rank: rank_s / median_s
        for rank, rank_s in enumerate(busy_s_by_rank)
        if median_s > 0 and rank_s > max_ratio * median_s
    }
