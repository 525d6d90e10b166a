"""The generated set that asks for credit over a chosen number of slices."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.core.errors import DataError
from pipeline.data.write.events import write_events
from pipeline.data.write.generated_events import FLASH_CLASSES, Flashes
from pipeline.data.write.recordings import frames

SIZE, SLICES = 34, 16


def counts(number: int, gap: int = 4, part: int = 0) -> NDArray[np.int64]:
    """[T, P, H, W]"""
    return frames(Flashes(number, part, gap=gap).events(), SLICES, SIZE).astype(np.int64)


@pytest.mark.parametrize("gap", [1, 4, 8])
def test_two_slices_that_far_apart_have_a_shape_in_one_half_each(gap: int) -> None:
    starts = set()
    for number in range(40):
        counts_T2HW = counts(number, gap)
        # A pixel of a flash has three events; noise is spread over all slices.
        by_half_2T = [half.sum((1, 2, 3)) for half in np.split(counts_T2HW, 2, axis=3)]
        left, right = (int(np.argmax(half_T)) for half_T in by_half_2T)
        is_right_first = FLASH_CLASSES[Flashes(number, 0).label].endswith("right first")
        assert right - left == (-gap if is_right_first else gap)
        starts.add(min(left, right))
    assert len(starts) > 4 and max(starts) < SLICES - gap


def test_a_pair_of_recordings_are_each_others_reversal_to_the_event() -> None:
    for number in (0, 6, 30):
        even_T2HW, odd_T2HW = counts(number), counts(number + 1)
        assert np.array_equal(even_T2HW, odd_T2HW[::-1]) and even_T2HW.sum() > 300
        labels = {Flashes(each, 0).label // 2 for each in (number, number + 1)}
        assert labels == {number // 2 % 4}
    assert not np.array_equal(counts(0), counts(8)) and not np.array_equal(
        counts(0), counts(0, part=1)
    )


def test_both_polarities_and_noise_in_every_slice() -> None:
    found = [counts(number) for number in range(0, 40, 2)]
    flashed = [counts_T2HW.sum((0, 2, 3)).argmax() for counts_T2HW in found]
    assert {0, 1} == set(flashed)
    assert all((counts_T2HW.sum((1, 2, 3)) >= 5).all() for counts_T2HW in found)


def test_the_gap_has_to_fit_and_belongs_to_flashes(tmp_path) -> None:
    with pytest.raises(DataError, match=r"gap must be in 1\.\.slices - 1.*gap=16, slices=16"):
        replace(Flashes(0, 0), gap=16)
    with pytest.raises(DataError, match="gap has no effect: moving has no flashes; got gap=2"):
        write_events("moving", tmp_path, gap=2)
    with pytest.raises(DataError, match=r"flashes need frames_by=time.*got frames_by=number"):
        write_events("flashes", tmp_path, frames_by="number")
    train, val = write_events("flashes", tmp_path, gap=2, samples=16, val_samples=8, slices=8)
    assert (train.samples, val.samples) == (16, 8)
