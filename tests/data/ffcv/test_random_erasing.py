"""Random erasing: rectangles where they should be by hand, noise that is normal, the rest
untouched.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.core.random import ERASE, ERASE_PIXELS, below, bits, normal_table
from pipeline.data.datasets.beton import Beton
from pipeline.data.ffcv.augment import ratio_table
from tests.helpers.views import MEAN, STD, epoch_of

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
