"""Moving shapes: their direction is neither in sums over time nor in any one moment, only in how
moments follow each other.

Saccades over still images.

The simulated camera on films of which the events are known.
"""

import hashlib
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import DataError
from pipeline.data.write.generated_events import (
    CLASSES,
    SHAPES,
    MovingShape,
    Saccades,
    add_noise,
    film_to_events,
    gaze_path,
    moving_shape_events,
    reversal,
)
from pipeline.data.write.recordings import Stream, frames


def digest(stream: Stream) -> str:
    content = b"".join(values_N.astype("<i8").tobytes() for values_N in stream[:4])
    return hashlib.sha256(content).hexdigest()[:16]


def events(stream: Stream, begin: int, end: int) -> np.ndarray:
    """Those from `begin` to `end`, in an order that does not depend on which comes first of two in
    one microsecond: [N,4].
    """
    rows = np.stack(stream[:4], 1)
    rows = rows[(rows[:, 0] >= begin) & (rows[:, 0] < end)]
    return rows[np.lexsort(rows.T)]


def place(counts_XX: np.ndarray) -> np.ndarray:
    """Where the events are along the last dimension, as an angle on the ring of its pixels:
    complex, whose angle it is.
    """
    return counts_XX @ np.exp(2j * np.pi * np.arange(counts_XX.shape[-1]) / counts_XX.shape[-1])


def test_sixteen_classes_take_turns() -> None:
    expected = ["disc right", "disc left", "disc down", "disc up", "square right"]
    assert CLASSES[:5] == expected and len(CLASSES) == 16
    assert [MovingShape(number, 0).label for number in (0, 1, 15, 16, 35)] == [0, 1, 15, 0, 3]


@pytest.mark.parametrize("number", range(16))
def test_a_direction_is_the_exact_reversal_of_its_opposite_so_sums_over_time_are_the_same(
    number: int,
) -> None:
    """The same draws played both ways: equal sums to the last count, so equally distributed over
    all draws.
    """
    recording = MovingShape(number, 0)
    shape, axis = recording.label // 4, recording.label % 4 // 2
    forwards = recording.base(shape, axis)
    backwards = reversal(forwards)
    np.testing.assert_array_equal(frames(forwards, 1, 34), frames(backwards, 1, 34))
    assert not np.array_equal(frames(forwards, 10, 34), frames(backwards, 10, 34))
    np.testing.assert_array_equal(frames(forwards, 4, 34), frames(backwards, 4, 34)[::-1])
    assert digest(reversal(backwards)) == digest(forwards)
    played, expected = recording.events(), backwards if recording.label % 2 else forwards
    coin = int(played.p_N[0] ^ expected.p_N[0])
    assert digest(played) == digest(expected._replace(p_N=expected.p_N ^ coin))


def test_the_coin_is_fair_and_knows_nothing_of_the_direction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = Stream(*np.zeros((4, 1), np.int64), sensor=(34, 34), span=(0, 1))
    monkeypatch.setattr(MovingShape, "base", lambda *_: one)  # its polarity is then the coin
    for is_reversed in range(2):
        coins = [MovingShape(number, 1).events().p_N[0] for number in range(is_reversed, 320, 2)]
        assert abs(np.mean(coins) - 0.5) < 3 * 0.5 / np.sqrt(160)


PICTURE = np.pad(np.full((12, 8), 200, np.uint8), ((8, 8), (10, 10)))  # 28 x 28
GIVEN: dict[str, Any] = {
    "size": 34,
    "radius": 6.5,
    "across": 30.25,
    "start": 20.125,
    "speed": 150 / 1024,
    "threshold": 0.3,
}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_seen_depends_on_where_the_shape_is_and_not_on_when(shape: str, axis: int) -> None:
    """To the event: 20 instants later the recording is that of a shape that started where this one
    then is.
    """
    later = moving_shape_events(
        shape, axis, **GIVEN | {"start": GIVEN["start"] + 20 * GIVEN["speed"]}
    )
    np.testing.assert_array_equal(
        events(moving_shape_events(shape, axis, **GIVEN), 20_000, 92_000) - [20_000, 0, 0, 0],
        events(later, 0, 72_000),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sensor_has_no_ends_so_no_place_is_special(shape: str) -> None:
    """A shape that starts k pixels further on gives the same events, k pixels further on, round the
    sensor.
    """
    moved = moving_shape_events(
        shape, 0, **GIVEN | {"start": GIVEN["start"] + 11, "across": GIVEN["across"] - 7}
    )
    still = frames(moving_shape_events(shape, 0, **GIVEN), 92, 34)
    np.testing.assert_array_equal(frames(moved, 92, 34), np.roll(still, (-7, 11), (2, 3)))
    assert (
        still[:, :, :, 0].any()
        and still[:, :, :, 33].any()
        and still[:, :, 0].any()
        and still[:, :, 33].any()
    )


def test_neither_place_nor_counts_of_any_slice_tell_the_direction() -> None:
    """Slice by slice, of 320 recordings to the right; those to the left are their reversals, slice
    9 - j for slice j.

    Place: with z = exp(2 pi i place / 34), 320 |mean z|^2 is exponentially distributed with mean 1
    where places are uniform, so above 10 once in 22,000 times. Counts, on and off: between two
    slices the means differ by less than 4 standard errors."""
    many = 320
    seen_NJPHW = np.stack(
        [frames(MovingShape(number, 1).base(number % 4, 0), 10, 34) for number in range(many)]
    )
    z_NJ = np.exp(1j * np.angle(place(seen_NJPHW.sum((2, 3)))))
    assert (many * np.abs(z_NJ.mean(0)) ** 2).max() < 10
    differ_NJP = (seen_NJPHW - seen_NJPHW[:, ::-1]).sum((3, 4))[:, :5]
    assert (np.abs(differ_NJP.mean(0)) < 4 * differ_NJP.std(0) / np.sqrt(many)).all()


def test_the_shape_goes_where_its_class_says() -> None:
    for direction, (axis, sign) in enumerate(((3, 1), (3, -1), (2, 1), (2, -1))):
        for number in range(direction, 64, 16):
            seen_JPHW = frames(MovingShape(number, 0).events(), 10, 34)
            early, late = (
                place(seen_JPHW[part].sum((0, 1, 5 - axis))) for part in (slice(0, 3), slice(7, 10))
            )
            way = np.angle(late / early) * 34 / (2 * np.pi)  # the shorter way round
            assert 6 < sign * way < 14, CLASSES[number % 16]  # seven tenths of 10 to 18.3 pixels


def test_a_recording_is_a_function_of_seed_part_and_number() -> None:
    one, again, *others = (
        digest(each.events())
        for each in (
            MovingShape(5, 0),
            MovingShape(5, 0),
            MovingShape(21, 0),
            MovingShape(5, 1),
            MovingShape(5, 0, content_seed=1),
        )
    )
    assert one == again == "f7d69df499d7df26" and len({one, *others}) == 4


def test_the_sensor_may_be_larger_and_not_too_small() -> None:
    stream = MovingShape(0, 0, size=48).events()
    assert stream.sensor == (48, 48) and stream.x_N.max() < 48
    with pytest.raises(DataError, match="size must be 16 or more pixels; got 8"):
        MovingShape(0, 0, size=8)
    said = "size must be at least 28 pixels, the longer side of the image; got 20"
    with pytest.raises(DataError, match=said):
        Saccades(PICTURE, 0, 0, 0, size=20)


def test_three_saccades_of_100_ms_each_and_back_show_edges_and_no_flat_ground() -> None:
    path = list(map(tuple, gaze_path()))
    assert len(path) == 76 and path[0] == path[-1] and len({path[0], path[25], path[50]}) == 3
    stream = Saccades(PICTURE, 3, 0, 0).events()
    assert stream.span == (0, 300_000) and stream.sensor == (34, 34)
    assert 500 < len(stream.t_N) < 10_000
    counts = frames(stream, 3, 34)
    thirds, counts = counts.sum((1, 2, 3)), counts.sum((0, 1))
    assert thirds.min() > 0.2 * thirds.sum()
    # around the upper edge, and the ground above
    assert counts[9:13, 13:21].mean() > 10 * counts[:4].mean()
    black = Saccades(np.zeros((28, 28), np.uint8), 0, 7, 0).events()
    assert 50 <= len(black.t_N) <= 100  # noise alone


@pytest.mark.parametrize(
    ("film", "threshold", "times", "signs"),
    [
        ([1.0] * 5, 0.1, [], []),  # nothing moves
        # thresholds of 0.5: one up, three more (to 2.0), none, two down (to 1.0)
        ([0.0, 0.5, 2.25, 2.25, 1.0], 0.5, [30, 70, 90, 110, 195, 225], [1, 1, 1, 1, 0, 0]),
        # the level stays at 1 until the intensity is one threshold below it
        ([0.0, 0.9, 1.1, 0.05], 1.0, [90], [1]),
    ],
)
def test_a_pixel_gives_an_event_for_each_threshold_that_it_crosses(
    film: list[float], threshold: float, times: list[int], signs: list[int]
) -> None:
    film_MHW = np.zeros((len(film), 2, 3))
    film_MHW[:, 1, 2] = film
    seen = film_to_events(film_MHW, threshold=threshold, step_us=60)
    assert (seen.t_N.tolist(), seen.p_N.tolist()) == (times, signs)
    assert (seen.y_N == 1).all() and (seen.x_N == 2).all()
    assert (seen.sensor, seen.span) == ((2, 3), (0, 60 * (len(film) - 1)))


def test_noise_is_laid_among_the_events_in_order_of_time() -> None:
    seen = film_to_events(
        np.linspace(0, 5, 11)[:, None, None] * np.ones((1, 4, 4)), threshold=0.5, step_us=100
    )
    noisy = add_noise(seen, MovingShape(0, 0), 50, first_draw=0)
    assert len(noisy.t_N) == len(seen.t_N) + 50
    assert np.all(np.diff(noisy.t_N) >= 0) and noisy.t_N.max() < 1000
    assert {noisy.y_N.max(), noisy.x_N.max()} == {3}
