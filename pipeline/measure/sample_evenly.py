"""A random subset of a stream of samples, drawn evenly from a stream of any length.

Each position in the stream draws a number, and the samples with the smallest numbers are kept. A
sorted set therefore yields samples of each class; its first batch does not. A set with alternating
classes does so too; every tenth sample of it might not.
"""

# T time, B batch

from bisect import bisect_left
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pipeline.core.random import COUNTED, bits
from pipeline.spiking.encode import is_static, repeat


class EvenSample:
    """Keeps copies of up to `most` inputs."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._passed = 0
        self._steps = 0  # time steps of a still image, which is stored once; 0: store each step
        self._drawn: list[int] = []  # ascending
        self._held: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._held)

    def add(self, x_TB: Tensor) -> None:
        """Offer the samples of a batch: all still images or none."""
        self._steps = len(x_TB) if is_static(x_TB) else 0
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
        """Yield the kept samples as `x_TB` of at most `size` samples. Still images stay still."""
        for first in range(0, len(self._held), size):
            held = self._held[first : first + size]
            yield (
                repeat(torch.stack(held), self._steps) if self._steps else torch.stack(held, dim=1)
            )
