from __future__ import annotations

import pytest
import torch

from pipeline.measure.evenly import Evenly
from pipeline.spiking.encode import is_still, repeat


def places(evenly: Evenly) -> list[int]:
    """Of the samples that are held, each of which was its place in the set."""
    return [int(value) for x_TB in evenly.batches(3) for value in x_TB[0].flatten()]


def test_one_of_every_so_many_is_held():
    evenly = Evenly(4)
    for first in range(0, 10, 5):
        evenly.add(torch.arange(first, first + 5.0)[None, :, None])
    assert places(evenly) == [0, 4, 8] and (evenly.stride, len(evenly)) == (4, 3)


@pytest.mark.parametrize("most", [1, 2, 5, 8])
def test_whatever_the_size_of_the_set_they_are_spread_over_all_of_it(most: int):
    evenly = Evenly(most)
    for place in range(100):
        evenly.add(torch.full((1, 1, 1), float(place)))
        assert places(evenly) == list(range(0, place + 1, evenly.stride))
        assert min(place + 1, most / 2) <= len(evenly) <= most


def test_still_images_are_held_once_and_stay_still():
    x_B = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    evenly = Evenly(8)
    evenly.add(repeat(x_B, 3))
    first, second = evenly.batches(4)
    assert is_still(first) and is_still(second)
    assert torch.equal(torch.cat([first, second], dim=1), repeat(x_B, 3))
    x_TB = torch.randn(3, 5, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    evenly = Evenly(8)
    evenly.add(x_TB)
    assert torch.equal(torch.cat(list(evenly.batches(4)), dim=1), x_TB)
