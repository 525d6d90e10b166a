"""Mixup and CutMix: each sample of a batch is mixed with its neighbour, and so is its target.

    x'_r = w x_r + (1 - w) x_n        y'_r = lam y_r + (1 - lam) y_n        n: row r + 1 where r is
    even, r - 1 where it is odd

    Mixup     w = lam everywhere                   lam ~ Beta(mixup, mixup)
    CutMix    w = 0 inside a box, 1 outside        l ~ Beta(cutmix, cutmix); the box has the share
                                                   1 - l of the image's area and is clipped at the
                                                   image's border; lam is the share outside the
                                                   clipped box

Rows are positions in the global batch, which is in random order. A neighbour is therefore as random
as any other partner, and it is on the same rank. Every draw is a pure function of (seed, step) or
(seed, step, row). The batches are therefore the same for any number of ranks and micro-batches and
after any restart.

Source: Zhang et al. 2018 (Mixup), arXiv:1710.09412; Yun et al. 2019 (CutMix), arXiv:1905.04899. The
options are those of timm 1.0.31, which pairs the first row of a rank with its last, and so on.
"""

# B batch, K classes, H W pixels

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.core.errors import require_data
from pipeline.core.random import MIX, MIX_BY_CUT, MIX_SHARE, MIX_X, MIX_Y, hash_on_device


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Mixes micro-batches on their device.

    Args:
        mixup, cutmix: the parameters of the two Beta distributions; 0 disables that mixing.
        probability: the probability that a draw mixes. Otherwise samples and targets stay
            unchanged.
        switch: the probability of CutMix if `mixup` and `cutmix` are both above 0; None: 1/2.
        per: one draw for the whole "batch", for each "pair" of neighbours, or for each "sample".

    Raises:
        DataError: an option is out of range, or has no effect.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0
    switch: float | None = None
    per: Literal["batch", "pair", "sample"] = "batch"

    def __post_init__(self) -> None:
        require_data(
            min(self.mixup, self.cutmix) >= 0 and self.mixup + self.cutmix > 0,
            "Mixing: mixup and cutmix must be 0 or more, and one of them above 0; got"
            f" mixup={self.mixup}, cutmix={self.cutmix}",
        )
        require_data(
            0 < self.probability <= 1,
            f"Mixing: probability must be above 0 and at most 1; got {self.probability}",
        )
        require_data(
            self.switch is None or (0 not in (self.mixup, self.cutmix) and 0 < self.switch < 1),
            "Mixing: switch must be between 0 and 1, and needs both mixup and cutmix; got"
            f" switch={self.switch}, mixup={self.mixup}, cutmix={self.cutmix}",
        )
        require_data(
            self.per in ("batch", "pair", "sample"),
            f"Mixing: per must be 'batch', 'pair' or 'sample'; got {self.per!r}",
        )

    def check(self, *, micro_batch: int) -> None:
        """Raises: DataError if the micro-batch would separate neighbours."""
        require_data(
            micro_batch % 2 == 0,
            "Mixing: the size of a micro-batch must be even, because samples are mixed in pairs;"
            f" got {micro_batch}",
        )

    def __call__(
        self, x_B: Tensor, target_B: Tensor, *, classes: int, seed: int, step: int, rows: range
    ) -> tuple[Tensor, Tensor]:
        """Mix `x` [B,...,H,W] and targets. The targets become class shares [B,K] of x's dtype.

        `rows`: the positions of the samples in the global batch.
        """
        assert len(rows) == len(x_B) and rows.start % 2 == len(rows) % 2 == 0, rows
        lam_B, box_B4 = self._draw(x_B, seed=seed, step=step, rows=rows)
        target_BK = x_B.new_zeros(len(x_B), classes).scatter_(1, target_B[:, None], 1)
        weight_B = lam_B.to(x_B)
        mixed_target_BK = _neighbours(target_BK).lerp_(target_BK, weight_B[:, None])
        weight_B = weight_B.view(-1, *[1] * (x_B.dim() - 1))
        if box_B4 is not None:
            weight_B = _pixel_weights(weight_B, box_B4, x_B)
        return _neighbours(x_B).lerp_(x_B, weight_B), mixed_target_BK

    def _draw(
        self, x_B: Tensor, *, seed: int, step: int, rows: range
    ) -> tuple[Tensor, Tensor | None]:
        """The share lam that each sample keeps, and its replaced box (top, bottom, left, right), in
        float64 and int64 on the device of `x_B`.

        The box of a sample without one is (-1, -1, -1, -1). Without CutMix the boxes are None.
        """
        row_B = torch.arange(rows.start, rows.stop, device=x_B.device)
        key_B = {"batch": torch.zeros_like(row_B), "pair": row_B // 2, "sample": row_B}[self.per]
        draw = lambda number: hash_on_device(seed, step, key_B, number)
        uniform = lambda number: ((draw(number) >> 11) & (2**53 - 1)).double() * 2.0**-53
        quantile_B = (draw(MIX_SHARE) >> 52) & 0xFFF
        cutmix_B, mixup_B = (
            _beta(each, x_B.device)[quantile_B] for each in (self.cutmix, self.mixup)
        )
        is_mixed_B = uniform(MIX) < self.probability
        lam_B = torch.where(is_mixed_B, mixup_B, torch.ones_like(mixup_B))
        if self.cutmix == 0:
            return lam_B, None
        is_cutmix_B = is_mixed_B
        if self.mixup > 0:
            switch = 0.5 if self.switch is None else self.switch
            is_cutmix_B = is_mixed_B & (uniform(MIX_BY_CUT) < switch)
        # Each box has a random centre, the image's aspect ratio and the share 1 - lam of its area.
        # It is then clipped at the image's border, and lam becomes the share outside of it.
        height, width = x_B.shape[-2:]
        edges = []
        for number, length in ((MIX_Y, height), (MIX_X, width)):
            middle_B = (((draw(number) >> 32) & 0xFFFF_FFFF) * length) >> 32
            size_B = (length * (1 - cutmix_B).sqrt()).long()
            edges += [
                (middle_B - size_B // 2).clamp(0, length),
                (middle_B + (size_B + 1) // 2).clamp(0, length),
            ]
        top_B, bottom_B, left_B, right_B = edges
        area_B = (bottom_B - top_B) * (right_B - left_B)
        lam_B = torch.where(is_cutmix_B, 1 - area_B.double() / (height * width), lam_B)
        return lam_B, torch.where(is_cutmix_B[:, None], torch.stack(edges, -1), -1)


@cache
def _beta(parameter: float, device: torch.device) -> Tensor:
    """4096 values at evenly spaced quantiles of Beta(parameter, parameter); all 1 for 0.

    They are rounded, because releases of scipy may differ in the last digit.
    """
    if parameter == 0:
        return torch.ones(4096, dtype=torch.float64, device=device)
    from scipy.special import betaincinv  # scipy comes with the extra [train]

    values = np.round(betaincinv(parameter, parameter, (np.arange(4096) + 0.5) / 4096), 6)
    return torch.from_numpy(values).to(device)


def _pixel_weights(weight_B: Tensor, box_B4: Tensor, x_B: Tensor) -> Tensor:
    """The weight of each pixel: [B,1,...,H,W].

    It is 0 inside the box of a sample and 1 outside. In a sample without a box it is `weight_B`
    everywhere.
    """
    height, width = x_B.shape[-2:]
    y_H1 = torch.arange(height, device=x_B.device)[:, None]
    x_W = torch.arange(width, device=x_B.device)
    top, bottom, left, right = box_B4.view(-1, 4, *[1] * (x_B.dim() - 1)).unbind(1)
    is_inside = (y_H1 >= top) & (y_H1 < bottom) & (x_W >= left) & (x_W < right)
    return torch.where(top < 0, weight_B, (~is_inside).to(x_B))


def _neighbours(x_B: Tensor) -> Tensor:
    """A copy with the two rows of each pair swapped."""
    return x_B.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
