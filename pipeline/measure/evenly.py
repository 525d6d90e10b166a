"""A few of the samples that pass by, evenly spread over all of them, however many there will be.

At first every sample is held, then every second, every fourth and so on, whenever there are more than `most`. So a set that is
sorted by class gives some of each, which its first batch does not.
"""

# T time, B batch

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.spiking.encode import is_still, repeat


class Evenly:
    """Holds copies of inputs: `most` at most, and at least half as many once so many have passed."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.stride = 1
        """of so many samples one is held"""
        self._passed = 0
        self._steps = 0  # of a still image, which is held once; 0: each step is held
        self._held: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._held)

    def add(self, x_TB: Tensor) -> None:
        """The samples of a batch, all still images or none."""
        self._steps = len(x_TB) if is_still(x_TB) else 0
        for place in range(x_TB.shape[1]):
            if self._passed % self.stride == 0:
                x = x_TB[0, place] if self._steps else x_TB[:, place]
                self._held.append(x.clone())
                if len(self._held) > self.most:
                    self._held, self.stride = self._held[::2], 2 * self.stride
            self._passed += 1

    def batches(self, size: int) -> Iterator[Tensor]:
        """`x_TB` of what is held, of at most `size` samples each; still images are still."""
        for first in range(0, len(self._held), size):
            held = self._held[first : first + size]
            yield repeat(torch.stack(held), self._steps) if self._steps else torch.stack(held, dim=1)
