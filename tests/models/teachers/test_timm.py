"""A timm model as a teacher: frozen, in eval, in fp32 or bf16, with its own head or a probe's."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.data.datasets.beton import IMAGENET_MEAN, IMAGENET_STD
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.data.ffcv.augment import level_table
from pipeline.models.teachers.base import content_hash
from pipeline.models.teachers.probe import Probe
from pipeline.models.teachers.timm import LEVELS, TeacherView, TimmTeacher, timm_teacher
from pipeline.models.teachers.weights import Untrained
from pipeline.recipe.recipe import spec
from tests.helpers.rule_networks import refusals


def teacher(
    *, classes: int = 1000, name: str = "test_efficientnet", shape: Any = (3, 16, 16), **more: Any
) -> TimmTeacher:
    return spec(timm_teacher, name=name, weights=spec(Untrained), **more).build(
        Synthetic(classes=classes, shape=shape)
    )


X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_it_is_frozen_and_stays_in_eval_whatever_is_asked() -> None:
    """Batch statistics would move in training, and with them the answers to the same picture."""
    found = teacher(size=32)
    before, first = content_hash(found.body), found(X)
    again = nn.Sequential(found).train()(X)
    assert torch.equal(first, again) and content_hash(found.body) == before
    assert not any(module.training for module in found.modules())
    assert not again.requires_grad and not any(p.requires_grad for p in found.parameters())


def test_it_sees_what_timm_would_show_it() -> None:
    found = teacher(size=32)
    resized = nn.functional.interpolate(
        (X * 0.2 + 0.5).clamp(0, 1), (32, 32), mode="bicubic", align_corners=False, antialias=True
    ).clamp(0, 1)
    own: Any = found.body.pretrained_cfg
    mean, std = (torch.tensor(own[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        wanted = found.body((resized - mean) / std)
    assert torch.allclose(found(X), wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("choices", "size", "crop"),
    [({}, 160, 1.0), ({"crop": "own"}, 160, 0.95), ({"size": 64, "crop": 0.5}, 64, 0.5)],
)
def test_its_own_size_and_cut_come_from_its_configuration(choices, size, crop) -> None:
    found = teacher(**choices).view
    assert (found.size, found.crop) == ((size, size), crop)


def test_in_bf16_it_answers_in_fp32_and_nearly_the_same() -> None:
    full, half = teacher(size=32), teacher(size=32, precision="bf16")
    assert {p.dtype for p in half.body.parameters()} == {torch.bfloat16}
    answer, exact = half(X), full(X)
    assert answer.dtype == torch.float32
    assert 0 < (answer - exact).abs().max() < 0.1 * exact.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as around a student in bf16
        assert torch.equal(full(X), exact)


def test_with_a_probe_it_answers_by_the_fitted_head() -> None:
    found = teacher(classes=3, size=32, probe=spec(Probe))
    features = found.features(X)
    assert features.shape == (4, found.body.num_features)
    found.head = nn.Linear(features.shape[1], 3)
    assert torch.equal(found(X), found.head(features))
    own: Any = found.body
    assert torch.allclose(own.get_classifier()(features), own(found.view(X)), atol=1e-5)


def test_what_it_answers_depends_on_all_that_it_calls_its_identity() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"size": 64},
        {"crop": 0.5},
        {"precision": "bf16"},
        {"name": "test_resnet"},
    ]
    found = [repr(teacher(**change).identity()) for change in changes]
    assert len(set(found)) == len(found)
    assert repr(teacher().identity()) == found[0]


test_refuses = refusals(
    [
        (
            {"classes": 13},
            ("test_efficientnet has 1000 classes and the data 13, so probe must be .*; got None"),
        ),
        (
            {"name": "test_efficientnett"},
            r"name must be a model of timm .*; got 'test_efficientnett': Unknown model",
        ),
        (
            {"name": "test_efficientnet.r160_in1l"},
            r"got 'test_efficientnet\.r160_in1l': Invalid pretrained tag \(r160_in1l\)",
        ),
        (
            {"name": "test_vit", "size": 96},
            "size must be 160, because test_vit has a fixed size; got 96",
        ),
        ({"size": 0}, "size must be 1 or more"),
        ({"crop": 1.5}, "crop must be a share"),
        (
            {"shape": (4, 2, 16, 16)},
            (
                r"data must be RGB or grey images, .*; got Synthetic of shape \(4, 2, 16,"
                r" 16\)"
            ),
        ),
    ],
    teacher,
)


# -------------------------------------------------------------------------------------------- view


HALF = (0.5, 0.5, 0.5)


def view(
    *, mean=IMAGENET_MEAN, std=IMAGENET_STD, size=8, own_mean=(0.0,) * 3, own_std=(1.0,) * 3, **more
) -> TeacherView:
    return TeacherView(
        mean=mean, std=std, size=(size, size), own_mean=own_mean, own_std=own_std, **more
    )


def pictures(side: int, *, seed: int = 0) -> Tensor:
    """Smooth ones, as levels of 8 bits: [2,3,H,W]."""
    coarse = torch.rand(2, 3, 7, 7, generator=torch.Generator().manual_seed(seed))
    return (
        torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1) * 255
    ).round()


def normalised(levels_BCHW: Tensor, mean, std) -> Tensor:
    table = torch.from_numpy(level_table(mean, std))
    return torch.stack([table[c][levels_BCHW[:, c].long()] for c in range(len(mean))], 1)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (IMAGENET_MEAN, IMAGENET_STD),
        (HALF, HALF),
        ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201)),
        ((0.0, 1.0, 0.3), (1.0, 0.01, 3.0)),
    ],
)
def test_every_level_comes_back_to_the_bit(mean, std) -> None:
    levels = torch.arange(256.0).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(view(mean=mean, std=std).pixels(normalised(levels, mean, std)), levels / 255)


def test_what_lies_between_levels_moves_by_half_a_step_at_most() -> None:
    mixed = 0.37 * pictures(16) + 0.63 * pictures(16, seed=1)
    x = ((mixed / 255).double() - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(
        IMAGENET_STD
    )[:, None, None]
    assert float((view().pixels(x.float()) - mixed / 255).abs().max()) < 0.5 / LEVELS + 2e-7


def test_grey_is_three_equal_channels() -> None:
    levels = pictures(8)[:, :1]
    found = view(mean=(0.3,), std=(0.4,))(normalised(levels, (0.3,), (0.4,)))
    assert torch.equal(found, (levels / 255).expand(-1, 3, -1, -1))


def test_in_its_own_size_the_teacher_sees_the_pixels_in_its_own_normalisation() -> None:
    levels = pictures(8)
    found = view(own_mean=HALF, own_std=HALF)(normalised(levels, IMAGENET_MEAN, IMAGENET_STD))
    assert torch.equal(found, (levels / 255 - 0.5) / 0.5)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("side", "size", "crop"), [(24, 40, 1.0), (40, 24, 1.0), (40, 24, 0.8)])
def test_it_is_cut_and_resized_as_pillow_does_it(
    side: int, size: int, crop: float, interpolation: str
) -> None:
    # away from black and white, where bicubic is clipped
    levels = (50 + 0.6 * pictures(side)).round()
    found = view(size=size, crop=crop, interpolation=interpolation)(
        normalised(levels, IMAGENET_MEAN, IMAGENET_STD)
    )
    kept = round(side * crop)
    first = (side - kept) // 2
    how = Image.Resampling[interpolation.upper()]
    for picture_HW, found_HW in zip(levels.flatten(0, 1), found.flatten(0, 1), strict=True):
        cut = Image.fromarray(
            picture_HW[first : first + kept, first : first + kept].numpy()
        )  # of float32, so nothing is rounded
        wanted_HW = np.asarray(cut.resize((size, size), how))
        assert np.abs(found_HW.numpy() * 255 - wanted_HW).max() < 1e-3


def test_of_a_picture_that_is_not_square_it_sees_the_middle() -> None:
    levels = pictures(12)[..., :8]
    found = view()(normalised(levels, IMAGENET_MEAN, IMAGENET_STD))
    assert torch.equal(found, levels[:, :, 2:10] / 255)


test_view_refuses = refusals(
    [({"crop": 0.0}, "crop must be a share"), ({"interpolation": "lanczos"}, "bilinear")], view
)
