"""Counts against a loop over the events; slices that nest; sizes that are resized; what is
refused.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import DataError
from pipeline.data.ffcv.format import Arrays
from pipeline.data.write.recordings import Framing, Stream, frames, sorted_stream
from pipeline.data.write.writer import Encoded


def stream(
    seed: int = 0, *, count: int = 500, sensor: tuple[int, int] = (12, 9), last_us: int = 1000
) -> Stream:
    rng = np.random.default_rng(seed)
    t_N = np.concatenate([rng.integers(0, last_us, count - 2), [0, last_us - 1]])
    places = (rng.integers(0, many, count) for many in (*sensor, 2))
    return sorted_stream(t_N, *places, sensor=sensor, span=(0, last_us))


def counted(events: Stream, slices: int, size: int, by: str) -> np.ndarray:
    """The definition, event by event."""
    out = np.zeros((slices, 2, size, size))
    (height, width), (begin, end) = events.sensor, events.span
    for i, (t, y, x, p) in enumerate(
        zip(events.t_N, events.y_N, events.x_N, events.p_N, strict=True)
    ):
        j = (
            math.floor((t - begin) * slices / (end - begin))
            if by == "time"
            else math.floor(i * slices / len(events.t_N))
        )
        out[j, p, math.floor(y * size / height), math.floor(x * size / width)] += 1
    return out


@pytest.mark.parametrize("by", ["time", "number"])
@pytest.mark.parametrize("slices", [1, 4, 7])
@pytest.mark.parametrize("size", [5, 12])
def test_counts_are_those_of_a_loop_over_the_events(by: Any, slices: int, size: int) -> None:
    events = stream()
    found = frames(events, slices, size, by=by)
    np.testing.assert_array_equal(found, counted(events, slices, size, by))
    assert found.sum() == 500


def test_slices_by_time_begin_where_the_span_is_cut() -> None:
    t_N, zeros = np.arange(10, 18), np.zeros(8, np.int64)
    events = Stream(t_N, zeros, np.arange(8), zeros, (1, 8), (10, 18))
    firsts = frames(events, 4, 8)[:, 0, 0].argmax(1).tolist()
    assert firsts == [0, 2, 4, 6]  # each the first of its two


@pytest.mark.parametrize("by", ["time", "number"])
@pytest.mark.parametrize("resize", ["sum", "area"])
def test_neighbouring_slices_make_those_of_a_coarser_cut(by: Any, resize: Any) -> None:
    events = stream(count=501, last_us=997)  # nothing divides
    fine, coarse = (frames(events, slices, 6, by=by, resize=resize) for slices in (12, 4))
    np.testing.assert_allclose(fine.reshape(4, 3, 2, 6, 6).sum(1), coarse, atol=1e-12)


def test_area_is_the_mean_over_the_pixels_beneath() -> None:
    """128 to 48 as 8 to 3: each pixel cut in three by three, then blocks of eight by eight
    averaged.
    """
    events = stream(sensor=(8, 16))
    raw = np.zeros((2, 2, 8, 16))
    for t, y, x, p in zip(events.t_N, events.y_N, events.x_N, events.p_N, strict=True):
        raw[2 * t // 1000, p, y, x] += 1
    cut = raw.repeat(3, 2).repeat(3, 3)
    np.testing.assert_allclose(
        frames(events, 2, 3, resize="area"), cut.reshape(2, 2, 3, 8, 3, 16).mean((3, 5)), rtol=1e-12
    )


@dataclass(frozen=True)
class Made:
    """A recording of the events that it is given."""

    made: Stream
    label: int = 0

    def events(self) -> Stream:
        return self.made


@pytest.mark.parametrize(
    ("how", "dtype", "tolerance"),
    [({"counts": "int16"}, "<i2", 0), ({"resize": "area"}, "<f2", 1e-3)],
)
def test_stored_as_counts_or_as_halves(how: dict[str, Any], dtype: str, tolerance: float) -> None:
    framing = Framing(slices=4, size=5, **how)
    encoded = framing(Made(stream()))
    assert isinstance(encoded, Encoded) and encoded.attributes == {}
    assert encoded.counts == {"events": 500, "saturated": 0}
    assert framing.kind == Arrays(np.dtype(dtype).name, (4, 2, 5, 5))
    found = np.frombuffer(encoded.payload, dtype).reshape(4, 2, 5, 5)
    np.testing.assert_allclose(
        found, frames(stream(), 4, 5, resize=how.get("resize", "sum")), rtol=tolerance
    )


def test_a_count_that_does_not_fit_is_refused_or_saturates_and_is_counted() -> None:
    t_N, zeros = np.arange(600), np.zeros(600, np.int64)
    hot = Made(Stream(t_N, zeros, np.repeat([0, 1, 2], [300, 256, 44]), zeros, (4, 4), (0, 600)))
    said = r"must be at most 255 \(uint8\); got 2 larger ones, up to 300; set counts='int16', store"
    assert re.search(said, str(Framing(slices=1, size=4)(hot)))
    cut = Framing(slices=1, size=4, overflow="saturate")(hot)
    assert isinstance(cut, Encoded) and cut.counts == {"events": 600, "saturated": 2}
    assert np.frombuffer(cut.payload, np.uint8)[:4].tolist() == [255, 255, 44, 0]
    assert isinstance(Framing(slices=1, size=4, counts="int16")(hot), Encoded)


@pytest.mark.parametrize(
    ("how", "advice"),
    [
        ({"counts": "int16"}, "store more slices, or set overflow='saturate'"),
        ({"resize": "area"}, "store more slices"),
    ],
)
def test_the_advice_on_a_large_count_names_options_with_an_effect(
    how: dict[str, Any], advice: str
) -> None:
    zeros = np.zeros(70_000, np.int64)
    hot = Made(Stream(np.arange(70_000), zeros, zeros, zeros, (1, 1), (0, 70_000)))
    assert str(Framing(slices=1, size=1, **how)(hot)).endswith(f"up to 70000; {advice}")


def last(**change: int) -> Stream:
    """Events of which the last has another x, y, p or t."""
    [(name, value)] = change.items()
    values = getattr(stream(), name).copy()
    values[-1] = value
    return stream()._replace(**{name: values})


NONE = np.zeros(0, np.int64)


@pytest.mark.parametrize(
    ("events", "said"),
    [
        (last(x_N=9), r"x of its events must be in 0\.\.8; got 0 to 9"),
        (last(y_N=-1), r"y of its events must be in 0\.\.11; got -1 to 11"),
        (last(p_N=2), r"p of its events must be in 0\.\.1; got 0 to 2"),
        (last(t_N=1000), r"t of its events must be in 0\.\.999; got 0 to 1000"),
        (Stream(NONE, NONE, NONE, NONE, (4, 4), (0, 1)), "it holds no event"),
        (stream()._replace(t_N=stream().t_N[::-1]), "must be in order of time"),
    ],
)
def test_events_that_cannot_be_are_refused(events: Stream, said: str) -> None:
    with pytest.raises(DataError, match=said):
        frames(events, 2, 5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"slices": 0}, r"slices must be in 1\.\.1000, size 1 or more; got slices=0"),
        ({"frames_by": "count"}, "frames_by must be 'time' or 'number'; got 'count'"),
        ({"resize": "bilinear"}, "resize must be 'sum' or 'area'"),
        ({"counts": "uint16"}, "counts must be 'uint8' or 'int16'"),
        (
            {"resize": "area", "counts": "int16"},
            "counts and overflow have no effect with resize='area'",
        ),
    ],
)
def test_options_that_contradict_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=f"^write events: {said}"):
        Framing(**{"slices": 4, "size": 5} | wrong)
