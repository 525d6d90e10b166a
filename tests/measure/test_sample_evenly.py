import numpy as np
import pytest
import torch

from pipeline.measure.energy import EvenSample
from pipeline.spiking.encode import is_static, repeat


def places(evenly: EvenSample) -> list[int]:
    """Of the samples that are held, each of which was its place in the set."""
    return [int(value) for x_TB in evenly.batches(3) for value in x_TB[0].flatten()]


@pytest.mark.parametrize("most", [1, 2, 5, 8])
def test_all_are_held_until_there_are_so_many_and_then_so_many(most: int):
    evenly, others, held = EvenSample(most), EvenSample(most), list[int]()
    for place in range(100):
        evenly.add(torch.full((1, 1, 1), float(place)))
        held = places(evenly)
        assert len(evenly) == len(set(held)) == min(place + 1, most) and max(held) <= place
    for first in range(0, 100, 7):
        others.add(torch.arange(first, min(100, first + 7.0))[None, :, None])
    assert places(others) == held


@pytest.mark.parametrize("classes", [2, 7, 8, 10, 16])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_each_class_is_among_them_and_each_about_as_often(classes: int, is_sorted: bool):
    """Whether the set is sorted by class or its classes take turns."""
    samples = 1600
    evenly = EvenSample(640)
    for first in range(0, samples, 100):
        evenly.add(torch.arange(first, first + 100.0)[None, :, None])
    held = np.array(places(evenly))
    counts = np.bincount(
        held * classes // samples if is_sorted else held % classes, minlength=classes
    )
    assert np.all(np.abs(counts - 640 / classes) < 4 * np.sqrt(640 / classes))


def test_still_images_are_held_once_and_stay_still():
    x_B = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    moving_TB = torch.randn(3, 5, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    for x_TB in (repeat(x_B, 3), moving_TB):
        evenly = EvenSample(8)
        evenly.add(x_TB)
        first, second = evenly.batches(4)
        assert is_static(first) == is_static(second) == is_static(x_TB)
        assert torch.equal(_sorted(torch.cat([first, second], dim=1)), _sorted(x_TB))


def _sorted(x_TB: torch.Tensor) -> torch.Tensor:
    return x_TB[:, x_TB[0].flatten(1)[:, 0].argsort()]
