"""The compiled operations on colour against timm's, which are Pillow's: to the bit."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import auto_augment

from pipeline.core.random import COLOUR, below, bits, normal_table
from pipeline.data.datasets.beton import Beton
from pipeline.data.ffcv.rand_augment import OPERATIONS, apply
from tests.helpers.views import MEAN, STD, crop_by_hand, epoch_of, normalised, resized

TIMM = (
    *(
        "AutoContrast",
        "Equalize",
        "Invert",
        "PosterizeIncreasing",
        "SolarizeIncreasing",
        "SolarizeAdd",
    ),
    *("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"),
)


def timms(
    pixels: np.ndarray, operation: int, level: float, sign: float, monkeypatch: pytest.MonkeyPatch
) -> np.ndarray:
    """The operation by timm, whose coin for the sign is made to fall so."""
    if OPERATIONS[operation] == "posterize":
        level = min(level, 9.99)
    with monkeypatch.context() as patch:
        patch.setattr(
            auto_augment, "random", SimpleNamespace(random=lambda: 0.9 if sign < 0 else 0.1)
        )
        of_level = auto_augment.LEVEL_TO_ARG[TIMM[operation]]
        arguments = () if of_level is None else of_level(level, {})
        return np.asarray(
            auto_augment.NAME_TO_OP[TIMM[operation]](Image.fromarray(pixels), *arguments)
        )


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Photographs, a dark one, one of few levels, one of a single colour, one of two levels,
    noise.
    """
    china, flower = (
        np.ascontiguousarray(photo[100:164, 200:264]) for photo in load_sample_images().images
    )
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    two = np.full((64, 64, 3), 100, np.uint8)
    two[0, 0] = 101
    return [
        china,
        flower,
        china // 5 + 20,
        flower // 64 * 64,
        np.full((64, 64, 3), 77, np.uint8),
        two,
        noise,
        noise // 2 + 60,
    ]


@pytest.mark.parametrize("operation", range(len(OPERATIONS)), ids=OPERATIONS)
def test_each_operation_is_timms(
    operation: int, pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = 0
    for pixels in pictures:
        for level in (0.0, 0.37, 2.5, 5.0, 8.61, 9.0, 9.99, 10.0):
            for sign in (1.0, -1.0):
                found = pixels.copy()
                apply(found, operation, level, sign)
                assert np.array_equal(found, timms(pixels, operation, level, sign, monkeypatch)), (
                    level,
                    sign,
                )
                changed += not np.array_equal(found, pixels)
    assert changed > 20


def recoloured(pixels: np.ndarray, i: int, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A view of sample i in epoch 3 at magnitude 9, by hand."""
    normals = normal_table()
    for layer in range(2):
        whether, which, strength, side = (
            bits(21, 3, i, COLOUR + 8 * layer + draw) for draw in range(4)
        )
        if whether >> np.uint64(63):
            level = 9 + 0.5 * float(normals[strength >> np.uint64(48)])
            sign = -1.0 if side >> np.uint64(63) else 1.0
            pixels = timms(pixels, int(below(which, 10)), min(max(level, 0), 10), sign, monkeypatch)
    return pixels


def test_views_are_recoloured_by_their_counters(raw, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, pictures = raw
    data = Beton(folder, classes=2, size=24, mean=MEAN, std=STD, flip="never", colour=9.0)
    for i, x in epoch_of(data, "train", 3):
        h, w, _ = pictures[i].shape
        shown = resized(pictures[i], crop_by_hand(h, w, 21, 3, i), 24)
        assert np.array_equal(x, normalised(recoloured(shown, i, monkeypatch)))


def test_all_operations_are_drawn_half_of_the_time() -> None:
    whether, which = (bits(0, 0, np.arange(4000), COLOUR + 8 + draw) for draw in range(2))
    counts = np.bincount(below(which[whether >> np.uint64(63) == 1], 10), minlength=10)
    assert 1900 < counts.sum() < 2100 and counts.min() > 160


def test_a_moved_window_is_recoloured_with_the_black_around_it(
    fashion, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"classes": 10, "size": 32, "crop": "shift", "mean": (0.0,) * 3, "std": (1.0,) * 3}
    plain, coloured = (
        dict(epoch_of(Beton(fashion, **options, **more), "train", 3))
        for more in ({}, {"colour": 9.0})
    )
    for i, x in coloured.items():
        shown = np.rint(plain[i] * 255).astype(np.uint8).transpose(1, 2, 0)
        assert np.array_equal(
            x, (recoloured(shown, i, monkeypatch) / np.float32(255)).transpose(2, 0, 1)
        )
