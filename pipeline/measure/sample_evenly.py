"""A few of the samples that pass by, from all over them, however many there will be.

Each place in the set draws a number, and the samples with the least are held. So a set that is
sorted by class gives some of each, which its first batch does not; and one whose classes take turns
does, too, with which every tenth sample would be in step."""

# T time, B batch

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pipeline.core.random import COUNTED, bits
from pipeline.spiking.encode import is_still, repeat


class EvenSample:
    """Holds copies of inputs: all until there are `most`, then `most` of them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._passed = 0
        self._steps = 0  # of a still image, which is held once; 0: each step is held
        self._drawn: list[int] = []  # ascending
        self._held: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._held)

    def add(self, x_TB: Tensor) -> None:
        """The samples of a batch, all still images or none."""
        self._steps = len(x_TB) if is_still(x_TB) else 0
        places_B = np.arange(self._passed, self._passed + x_TB.shape[1])
        self._passed += len(places_B)
        drawn_B = bits(0, 0, places_B, COUNTED)
        is_full = len(self._drawn) == self.most
        low_B = np.flatnonzero(drawn_B < self._drawn[-1]) if is_full else np.arange(len(drawn_B))
        for place, drawn in zip(low_B.tolist(), drawn_B[low_B].tolist(), strict=True):
            rank = bisect_left(self._drawn, drawn)
            if rank < self.most:
                x = x_TB[0, place] if self._steps else x_TB[:, place]
                self._drawn.insert(rank, drawn)
                self._held.insert(rank, x.clone())
                del self._drawn[self.most :], self._held[self.most :]

    def batches(self, size: int) -> Iterator[Tensor]:
        """`x_TB` of what is held, of at most `size` samples each; still images are still."""
        for first in range(0, len(self._held), size):
            held = self._held[first : first + size]
            yield (
                repeat(torch.stack(held), self._steps) if self._steps else torch.stack(held, dim=1)
            )
