"""A learnable data set of counter-based random numbers, for tests and benchmarks.

It needs neither files nor FFCV. A class is a smooth random pattern. A sample is the pattern of its
class at half to full contrast, plus noise. The order of samples, resumption and `repeats` are as
for data in files. A set of recordings imitates event data: a class has a pattern for each of T time
steps, and values are counts.
"""

# B batch, K classes, T time, C channels (T x C for a recording), H W pixels

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.core.errors import require_data
from pipeline.core.random import FLIP, SHIFT_X, SHIFT_Y, below, bits, uniform
from pipeline.data.base import Batch
from pipeline.data.order import OrderedData, Part, TrainOrder, ValOrder

_PATTERN, _NOISE, _CONTRAST, _FIELD_A, _FIELD_B = 64, 65, 66, 67, 68  # draws, see random.py
_FIELDS = 61  # noise fields; a sample adds two of them, so there are 61 x 61 combinations


class Synthetic(OrderedData):
    """Synthetic images or recordings. Sample i has class `i % classes`.

    Args:
        samples, val_samples: numbers of training and evaluation samples.
        shape: (C, H, W) of images, or (T, C, H, W) of recordings. The values of recordings are
            whole numbers from 0, like counts of events.
        noise: the standard deviation of the noise. A pattern at full contrast has 1.
        augment: "shift-flip" shifts a training sample by up to max(1, H // 8) pixels, with zeros
            outside, and mirrors it with probability 1/2.
        repeats: views of each sample in a training batch (order.py).
        content_seed: selects patterns and noise. It is part of the data, unlike the `seed` of
            `train`.

    Raises:
        DataError: an option is out of range.
    """

    def __init__(
        self,
        samples: int = 512,
        *,
        classes: int = 10,
        shape: tuple[int, ...] = (1, 16, 16),
        val_samples: int = 128,
        noise: float = 0.5,
        augment: Literal["shift-flip", "none"] = "shift-flip",
        repeats: int = 1,
        content_seed: int = 0,
    ) -> None:
        require_data(
            min(samples, val_samples, classes, *shape) >= 1 and len(shape) in (3, 4),
            "Synthetic: samples, val_samples, classes and the 3 or 4 sizes of shape must be 1"
            f" or more; got samples={samples}, val_samples={val_samples}, classes={classes},"
            f" shape={shape}",
        )
        require_data(
            augment in ("shift-flip", "none") and repeats >= 1 and min(noise, content_seed) >= 0,
            "Synthetic: augment must be 'shift-flip' or 'none', repeats 1 or more, noise and"
            f" content_seed 0 or more; got augment={augment!r}, repeats={repeats}, noise={noise},"
            f" content_seed={content_seed}",
        )
        self.samples, self.val_samples, self.classes = samples, val_samples, classes
        self.shape = tuple(int(size) for size in shape)
        # A teacher needs pixels, so it treats the values as pixels with this normalisation.
        self.mean, self.std = (0.5,) * shape[-3], (0.2,) * shape[-3]
        self.noise, self.augment = float(noise), augment
        self.content_seed, self.repeats = content_seed, repeats

    def fingerprint(self) -> str:
        sizes = (self.samples, self.val_samples, self.classes, self.shape)
        parts = ("synthetic-1", *sizes, self.noise, self.content_seed)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def check(self) -> None:
        """Do nothing: there is no file."""

    def _samples(self, part: Part) -> int:
        return self.samples if part == "train" else self.val_samples

    def _labels(self, part: Part) -> NDArray[np.int64]:
        return np.arange(self._samples(part)) % self.classes

    def _loader(
        self, part: str, order: TrainOrder | ValOrder, *, seed: int, threads: int
    ) -> "SyntheticLoader":
        is_augmented = part == "train" and self.augment == "shift-flip"
        return SyntheticLoader(self, order, seed=seed if is_augmented else None)


class SyntheticLoader:
    """The batches of a `Synthetic`, computed when they are read.

    `seed`: selects the augmentation; None: no augmentation.
    """

    def __init__(
        self, data: Synthetic, order: TrainOrder | ValOrder, *, seed: int | None = None
    ) -> None:
        self.samples, self.steps_per_epoch = order.samples, order.steps
        self._data, self._order, self._seed = data, order, seed
        self._part = int(isinstance(order, ValOrder))
        *channels, height, width = data.shape
        maps = math.prod(channels)
        # A smooth pattern for each class, with mean 0 and standard deviation 1. Each channel
        # interpolates 4 x 4 random values linearly.
        corners = _uniform(data.content_seed, _PATTERN, (data.classes, maps, 4, 4))
        rows, columns = (
            np.maximum(0.0, 1.0 - np.abs(np.linspace(0, 3, size)[:, None] - np.arange(4)))
            for size in (height, width)
        )
        x_KCHW = np.einsum("hi,kcij,wj->kchw", rows, corners, columns)
        x_KCHW -= x_KCHW.mean((1, 2, 3), keepdims=True)
        x_KCHW /= np.maximum(x_KCHW.std((1, 2, 3), keepdims=True), 1e-6)
        self._patterns_KCHW = x_KCHW.astype(np.float32)
        # Noise fields F. The sum of two has the standard deviation `data.noise`, because a uniform
        # distribution of width 1 has variance 1/12.
        fields_FCHW = _uniform(data.content_seed, _NOISE, (_FIELDS, maps, height, width))
        self._fields_FCHW = (fields_FCHW * (data.noise * np.sqrt(6.0))).astype(np.float32)

    @contextmanager
    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Iterator[Batch]]:
        ids, size = self._order.epoch(epoch, start=start), self._order.micro_batch
        # Each view's counter for its random numbers, see random.py.
        counters = epoch + (self._order.view_numbers(start=start) << 32)
        yield (
            self._batch(ids[i : i + size], counters[i : i + size]) for i in range(0, len(ids), size)
        )

    def close(self) -> None:
        """Do nothing: nothing is open."""

    def _batch(self, ids_B: NDArray[np.int64], counter_B: NDArray[np.int64]) -> Batch:
        target_B = ids_B % self._data.classes
        draw = lambda number: bits(self._data.content_seed, self._part, ids_B, number)
        contrast_B = (0.5 + (draw(_CONTRAST) >> np.uint64(40)) * 2.0**-25).astype(np.float32)
        x_BCHW = self._patterns_KCHW[target_B] * contrast_B[:, None, None, None]
        x_BCHW += self._fields_FCHW[below(draw(_FIELD_A), _FIELDS)]
        x_BCHW += self._fields_FCHW[below(draw(_FIELD_B), _FIELDS), :, ::-1, ::-1]
        if self._seed is not None:
            x_BCHW = _shift_flip(x_BCHW, ids_B, seed=self._seed, counter_B=counter_B)
        if len(self._data.shape) == 4:
            x_BCHW = np.maximum(np.rint(x_BCHW), 0.0)
        x_B = torch.from_numpy(x_BCHW.reshape(len(ids_B), *self._data.shape))
        return Batch(x_B, torch.from_numpy(target_B), torch.from_numpy(ids_B.copy()))


def _uniform(seed: int, draw: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Uniform random numbers in -0.5..0.5."""
    return (uniform(bits(seed, 0, np.arange(math.prod(shape)), draw)) - 0.5).reshape(shape)


def _shift_flip(
    x_BCHW: NDArray[np.float32],
    ids_B: NDArray[np.int64],
    *,
    seed: int,
    counter_B: NDArray[np.int64],
) -> NDArray[np.float32]:
    reach = max(1, x_BCHW.shape[2] // 8)
    top_B = below(bits(seed, counter_B, ids_B, SHIFT_Y), 2 * reach + 1)
    left_B = below(bits(seed, counter_B, ids_B, SHIFT_X), 2 * reach + 1)
    is_mirrored_B = below(bits(seed, counter_B, ids_B, FLIP), 2)
    height, width = x_BCHW.shape[2:]
    padded = np.pad(x_BCHW, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
    out = np.empty_like(x_BCHW)
    for b in range(len(ids_B)):
        window = padded[b, :, top_B[b] : top_B[b] + height, left_B[b] : left_B[b] + width]
        out[b] = window[:, :, ::-1] if is_mirrored_B[b] else window
    return out
