"""Moving shapes: their direction is in time alone."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from pipeline.data.errors import DataError
from pipeline.data.events.frames import Stream, frames
from pipeline.data.events.moving import CLASSES, Moving, reversal


def digest(stream: Stream) -> str:
    arrays = (stream.t_N, stream.y_N, stream.x_N, stream.p_N)
    return hashlib.sha256(b"".join(each.astype("<i8").tobytes() for each in arrays)).hexdigest()[:16]


def test_sixteen_classes_take_turns() -> None:
    assert CLASSES[:5] == ["disc right", "disc left", "disc down", "disc up", "square right"] and len(CLASSES) == 16
    assert [Moving(number, 0).label for number in (0, 1, 15, 16, 35)] == [0, 1, 15, 0, 3]


@pytest.mark.parametrize("number", range(16))
def test_a_direction_is_the_exact_reversal_of_its_opposite_so_sums_over_time_are_the_same(number: int) -> None:
    """The same draws played both ways: equal sums to the last count, so equally distributed over all draws."""
    recording = Moving(number, 0)
    shape, axis = recording.label // 4, recording.label % 4 // 2
    forwards = recording.base(shape, axis)
    backwards = reversal(forwards)
    np.testing.assert_array_equal(frames(forwards, 1, 34), frames(backwards, 1, 34))
    assert not np.array_equal(frames(forwards, 10, 34), frames(backwards, 10, 34))
    np.testing.assert_array_equal(frames(forwards, 4, 34), frames(backwards, 4, 34)[::-1])
    assert digest(reversal(backwards)) == digest(forwards)
    is_reversed = recording.label % 2 == 1
    played = recording.events()
    expected = backwards if is_reversed else forwards
    coin = int(played.p_N[0] ^ expected.p_N[0])
    assert digest(played) == digest(expected._replace(p_N=expected.p_N ^ coin))


def test_the_coin_is_fair_and_knows_nothing_of_the_direction() -> None:
    coins: list[list[int]] = [[], []]
    for number in range(320):
        recording = Moving(number, 1)
        coins[number % 2].append(recording._draw(262, 2))  # without the recording: 262 is the coin's draw
    for each in coins:
        assert abs(np.mean(each) - 0.5) < 3 * 0.5 / np.sqrt(160)


def test_the_shape_goes_where_its_class_says() -> None:
    for direction, (along, sign) in enumerate((("x_N", 1), ("x_N", -1), ("y_N", 1), ("y_N", -1))):
        for number in range(direction, 64, 16):
            stream = Moving(number, 0).events()
            places = getattr(stream, along)
            early, late = places[stream.t_N < 30_000], places[stream.t_N > 62_000]
            assert sign * (np.median(late) - np.median(early)) > 2, CLASSES[number % 16]


def test_a_recording_is_a_function_of_seed_part_and_number() -> None:
    assert digest(Moving(5, 0).events()) == digest(Moving(5, 0).events()) == "8c69c794adb3b69d"
    others = {digest(each.events()) for each in (Moving(5, 0), Moving(21, 0), Moving(5, 1), Moving(5, 0, content_seed=1))}
    assert len(others) == 4


def test_the_sensor_may_be_larger_and_not_too_small() -> None:
    stream = Moving(0, 0, size=48).events()
    assert stream.sensor == (48, 48) and stream.x_N.max() < 48
    with pytest.raises(DataError, match="size must be 16 or more pixels; got 8"):
        Moving(0, 0, size=8)
