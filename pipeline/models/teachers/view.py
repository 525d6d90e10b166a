"""From what the student gets to what a teacher was trained on: the data set's normalisation undone,
cut, resized, normalised.
"""

# B batch, C channels, H W pixels

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.checks import refuse_unless_one_of

LEVELS = 255 * 1024
"""steps that a pixel is rounded to: coarse beside float32's error (1e-7), fine beside a level of 8
bits
"""


class View(nn.Module):
    """The same augmented view, `[B,C,H,W]` as the data set normalised it, in the teacher's eyes:
    `[B,3,h,w]`, fp32.

    Args:
        mean, std: of the data set, a value a channel.
        size: (h, w) of the teacher.
        crop: the share of the view that the teacher looks at, of the side of its largest central
        square. interpolation: "bicubic" or "bilinear", both with antialiasing, as Pillow has them.
        own_mean, own_std: the teacher's, of RGB.

    Raises: ValueError for another interpolation or a crop outside 0..1.
    """

    mean: Tensor
    std: Tensor
    own_mean: Tensor
    own_std: Tensor

    def __init__(
        self,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        size: tuple[int, int],
        crop: float = 1.0,
        interpolation: str = "bicubic",
        own_mean: tuple[float, ...],
        own_std: tuple[float, ...],
    ) -> None:
        super().__init__()
        refuse_unless_one_of("View", ("bicubic", "bilinear"), interpolation=interpolation)
        if not 0 < crop <= 1:
            raise ValueError(f"View: crop must be a share in 0..1, 0 excluded; got {crop}")
        self.size, self.crop, self.interpolation = size, crop, interpolation
        for name, values in (
            ("mean", mean),
            ("std", std),
            ("own_mean", own_mean),
            ("own_std", own_std),
        ):
            self.register_buffer(
                name, torch.tensor(values, dtype=torch.float32)[:, None, None], persistent=False
            )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        pixels_BCHW = self.pixels(x_BCHW)
        height, width = pixels_BCHW.shape[-2:]
        side = max(1, round(min(height, width) * self.crop))
        top, left = (height - side) // 2, (width - side) // 2
        pixels_BCHW = pixels_BCHW[..., top : top + side, left : left + side]
        if (side, side) != self.size:
            resized_BCHW = F.interpolate(
                pixels_BCHW, self.size, mode=self.interpolation, align_corners=False, antialias=True
            )
            pixels_BCHW = resized_BCHW.clamp(0, 1)  # bicubic overshoots at edges
        return (pixels_BCHW - self.own_mean) / self.own_std

    def pixels(self, x_BCHW: Tensor) -> Tensor:
        """RGB in 0..1, grey as three equal channels: exactly k/255 for what was level k of 8 bits.

        What a float32 normalisation lost is far below a step of `LEVELS`; pixels between two
        levels, where pictures were mixed, move by half such a step at most. Only what is no colour
        is cut to one: of the noise of a random erasing a few hundredths, which the student sees
        uncut.
        """
        pixels_BCHW = torch.round((x_BCHW.float() * self.std + self.mean) * LEVELS) / LEVELS
        return pixels_BCHW.clamp(0, 1).expand(-1, 3, -1, -1)
