"""Strong augmentation: colours are timm's, which are Pillow's, to the bit; erased rectangles are
where they should be by hand, and the rest is untouched.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import auto_augment

from pipeline.core.random import COLOUR, ERASE, ERASE_PIXELS, below, bits, normal_table
from pipeline.data.datasets.beton import Beton
from pipeline.data.ffcv.augment import ratio_table
from pipeline.data.ffcv.strong_augment import OPERATIONS, apply_operation
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
                apply_operation(found, operation, level, sign)
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


# ------------------------------------------------------------------------------------------ erasing

SIDE, P = 24, 0.6


def erased_by_hand(x_CSS: np.ndarray, i: int, epoch: int) -> np.ndarray:
    draw = lambda number: int(bits(21, epoch, i, ERASE + number))
    if (draw(0) >> 11) * 2.0**-53 >= P:
        return x_CSS
    ratios, x_CSS = ratio_table((0.3, 1 / 0.3)), x_CSS.copy()
    for attempt in range(10):
        area = (0.02 + (1 / 3 - 0.02) * ((draw(8 + 4 * attempt) >> 11) * 2.0**-53)) * SIDE * SIDE
        ratio = ratios[draw(9 + 4 * attempt) >> 52]
        height, width = (math.floor(math.sqrt(each) + 0.5) for each in (area * ratio, area / ratio))
        if height < SIDE and width < SIDE:
            top = int(below(draw(10 + 4 * attempt), SIDE - height + 1))
            left = int(below(draw(11 + 4 * attempt), SIDE - width + 1))
            places = np.arange(3 * height * width)
            quarter = (48 - 16 * (places % 4)).astype(np.uint64)
            words = bits(21, epoch, i, ERASE_PIXELS + places // 4) >> quarter & np.uint64(65535)
            x_CSS[:, top : top + height, left : left + width] = normal_table()[words].reshape(
                3, height, width
            )
            return x_CSS
    return x_CSS


@pytest.mark.parametrize("crop", ["resized", "centre"])
def test_rectangles_are_those_of_their_counters(raw, crop: str) -> None:
    folder, _ = raw
    options = {"classes": 2, "size": SIDE, "crop": crop, "mean": MEAN, "std": STD}
    plain, erased = (
        dict(epoch_of(Beton(folder, **options, **more), "train", 2)) for more in ({}, {"erase": P})
    )
    shares = []
    for i, x_CSS in erased.items():
        assert np.array_equal(x_CSS, erased_by_hand(plain[i], i, 2))
        shares.append(float((x_CSS != plain[i]).any(0).mean()))
    shares = [share for share in shares if share]
    assert 22 < len(shares) < 50 and 0.015 < min(shares) < 0.08 and 0.25 < max(shares) < 0.36


def test_a_moved_window_is_erased_too(fashion) -> None:
    options = {
        "classes": 10,
        "size": 28,
        "channels": 1,
        "crop": "shift",
        "mean": (0.0,),
        "std": (1.0,),
    }
    plain, erased = (
        dict(epoch_of(Beton(fashion, **options, **more), "train")) for more in ({}, {"erase": 1.0})
    )
    assert all(0.01 < (plain[i] != erased[i]).mean() < 0.36 for i in plain)


def test_the_noise_is_normal() -> None:
    table = normal_table().astype(float)
    assert (
        abs(table.mean()) < 1e-6
        and abs(table.std() - 1) < 1e-3
        and np.array_equal(table, -table[::-1])
    )
    assert abs((table < 1).mean() - 0.841345) < 1e-4
