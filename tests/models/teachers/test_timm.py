"""A timm model as a teacher: frozen, in eval, in fp32 or bf16, with its own head or a probe's."""

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.data.datasets.synthetic import Synthetic
from pipeline.models.teachers.base import content_hash
from pipeline.models.teachers.probe import Probe
from pipeline.models.teachers.timm import TimmTeacher, timm_teacher
from pipeline.models.teachers.weights import Untrained
from pipeline.recipe.recipe import spec


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
    before = content_hash(found.body)
    first = found(X)
    again = nn.Sequential(found).train()(X)
    assert torch.equal(first, again)
    assert not any(module.training for module in found.modules())
    assert content_hash(found.body) == before
    assert not again.requires_grad and not any(p.requires_grad for p in found.parameters())


def test_it_sees_what_timm_would_show_it() -> None:
    found = teacher(size=32)
    pixels = (X * 0.2 + 0.5).clamp(0, 1)
    resized = nn.functional.interpolate(
        pixels, (32, 32), mode="bicubic", align_corners=False, antialias=True
    ).clamp(0, 1)
    own: Any = found.body.pretrained_cfg
    mean, std = (torch.tensor(own[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        wanted = found.body((resized - mean) / std)
    assert torch.allclose(found(X), wanted, atol=1e-4)


def test_its_own_size_and_cut_come_from_its_configuration() -> None:
    assert teacher().view.size == (160, 160)
    found = teacher(crop="own").view
    assert (found.size, found.crop) == ((160, 160), 0.95)
    assert teacher(size=64, crop=0.5).view.crop == 0.5


def test_in_bf16_it_answers_in_fp32_and_nearly_the_same() -> None:
    full, half = teacher(size=32), teacher(size=32, precision="bf16")
    assert {p.dtype for p in half.body.parameters()} == {torch.bfloat16}
    answer = half(X)
    assert answer.dtype == torch.float32
    assert 0 < float((answer - full(X)).abs().max()) < 0.1 * float(full(X).abs().max())


def test_the_students_autocast_does_not_reach_it() -> None:
    found = teacher(size=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = found(X)
    assert torch.equal(inside, found(X))


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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"classes": 13},
            (
                "test_efficientnet has 1000 classes and the data 13, so it needs a probe, .*;"
                " got None"
            ),
        ),
        (
            {"name": "test_efficientnett"},
            "name must be a model of timm .*; got 'test_efficientnett'; near it: test_efficientnet",
        ),
        (
            {"name": "test_efficientnet.r160_in1l"},
            "test_efficientnet must have the tag 'r160_in1l'; timm .* knows r160_in1k",
        ),
        (
            {"name": "test_vit", "size": 96},
            "size must be 1 or more, and 160 if test_vit has a fixed size; got 96",
        ),
        ({"size": 0}, "size must be 1 or more"),
        ({"crop": 1.5}, "crop must be a share"),
        (
            {"shape": (4, 2, 16, 16)},
            (
                r"needs images, RGB or grey, .*; got Synthetic of shape \(4, 2, 16,"
                r" 16\)"
            ),
        ),
    ],
)
def test_refuses(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        teacher(**changes)
