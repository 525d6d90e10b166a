"""Saccades over still images."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.errors import DataError
from pipeline.data.write.recordings import frames
from pipeline.data.write.saccades import Saccades, gaze


def picture() -> np.ndarray:
    image = np.zeros((28, 28), np.uint8)
    image[8:20, 10:18] = 200
    return image


def test_three_saccades_of_100_ms_each_and_back() -> None:
    path = gaze()
    assert len(path) == 76 and path[0] == path[-1] and len({path[0], path[25], path[50]}) == 3
    stream = Saccades(picture(), 3, 0, 0).events()
    assert stream.span == (0, 300_000) and stream.sensor == (34, 34)
    assert 500 < len(stream.t_N) < 10_000
    thirds = frames(stream, 3, 34).sum((1, 2, 3))
    assert thirds.min() > 0.2 * thirds.sum()


def test_edges_are_seen_and_flat_ground_is_not() -> None:
    counts = frames(Saccades(picture(), 3, 0, 0).events(), 1, 34).sum((0, 1))
    assert (
        counts[9:13, 13:21].mean() > 10 * counts[:4].mean()
    )  # around the upper edge, and the ground above


def test_a_black_picture_shows_noise_alone() -> None:
    stream = Saccades(np.zeros((28, 28), np.uint8), 0, 7, 0).events()
    assert 50 <= len(stream.t_N) <= 100


def test_a_picture_larger_than_the_sensor_is_refused() -> None:
    with pytest.raises(DataError, match="size must be the picture's 28 pixels or more; got 20"):
        Saccades(picture(), 0, 0, 0, size=20)
