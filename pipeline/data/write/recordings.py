"""Turns the events of a recording into frames of counts, and encodes them.

    F[j, p, y, x] = number of events of polarity p at (y, x) in slice j        j = 0..slices-1

With "time", slices have equal length: j = floor((t - begin) slices / (end - begin)). With "number",
they have equal numbers of events: the i-th of N events is in slice floor(i slices / N). In both
cases, slices 2j and 2j + 1 of 2n slices are together slice j of n slices. A file can therefore be
read with any number of slices that divides the stored number.

There are two ways to resize a recording. With "sum", an event at x falls on pixel
floor(x size / width). Counts are then whole, and no event is lost. With "area", a pixel is the mean
count of the sensor pixels that it covers, weighted by the covered area. It is stored as float16.
Means do not grow with the sensor. Published recipes normalise interpolated frames, whose values do
not grow either.
"""

# N events of a recording, J slices, P polarities (0 off: darker, 1 on: brighter), h w sensor,
# H W of a frame

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import require_data
from pipeline.data.ffcv.format import Arrays
from pipeline.data.write.writer import Encoded

FramesBy = Literal["time", "number"]
Resize = Literal["sum", "area"]
MAX_SLICES = 1000
_OVERFLOW_ADVICE = {
    "uint8": "set counts='int16', store more slices, or set overflow='saturate'",
    "int16": "store more slices, or set overflow='saturate'",
    "float16": "store more slices",
}


class Stream(NamedTuple):
    """The events of a recording, in order of time."""

    t_N: NDArray[np.int64]  # microseconds, begin <= t < end
    y_N: NDArray[np.int64]
    x_N: NDArray[np.int64]
    p_N: NDArray[np.int64]  # 0 off, 1 on
    sensor: tuple[int, int]  # height, width in pixels
    span: tuple[int, int]  # begin, end in microseconds


@dataclass(frozen=True, kw_only=True)
class Framing:
    """Encodes recordings as `slices` frames of `size` x `size` pixels with two polarities.

    A recording has a method `events()` that reads or generates its Stream. The method raises
    OSError or ValueError if the recording is damaged.

    Args:
        frames_by: cut slices by "time" or by the "number" of events.
        resize: "sum" or "area".
        counts: the stored type: "uint8" up to 255, or "int16" up to 32767. "area" always stores
            float16.
        overflow: "refuse" a recording with a larger count, or "saturate" the count. The manifest
            has the number of saturated counts.

    Raises:
        DataError: an option is unknown or out of range, or has no effect.
    """

    slices: int
    size: int
    frames_by: FramesBy = "time"
    resize: Resize = "sum"
    counts: Literal["uint8", "int16"] = "uint8"
    overflow: Literal["refuse", "saturate"] = "refuse"

    def __post_init__(self) -> None:
        for name, choices in (
            ("frames_by", ("time", "number")),
            ("resize", ("sum", "area")),
            ("counts", ("uint8", "int16")),
            ("overflow", ("refuse", "saturate")),
        ):
            require_data(
                getattr(self, name) in choices,
                f"write events: {name} must be {' or '.join(map(repr, choices))}; got"
                f" {getattr(self, name)!r}",
            )
        require_data(
            1 <= self.slices <= MAX_SLICES and self.size >= 1,
            f"write events: slices must be in 1..{MAX_SLICES}, size 1 or more; got"
            f" slices={self.slices}, size={self.size}",
        )
        require_data(
            self.resize != "area" or (self.counts, self.overflow) == ("uint8", "refuse"),
            "write events: counts and overflow have no effect with resize='area', which stores"
            f" float16; got counts={self.counts!r}, overflow={self.overflow!r}",
        )

    @property
    def kind(self) -> Arrays:
        return Arrays(
            "float16" if self.resize == "area" else self.counts,
            (self.slices, 2, self.size, self.size),
        )

    def __call__(self, recording: Any) -> Encoded | str:
        try:
            stream = recording.events()
            frames_JPHW = frames(
                stream, self.slices, self.size, by=self.frames_by, resize=self.resize
            )
        except (OSError, ValueError) as error:
            return str(error)
        dtype = np.dtype(self.kind.dtype)
        max_count = np.finfo(dtype).max if dtype.kind == "f" else np.iinfo(dtype).max
        overflows = int(np.count_nonzero(frames_JPHW > max_count))
        if overflows and self.overflow == "refuse":
            return (
                f"its counts must be at most {max_count:g} ({dtype}); got {overflows} larger ones,"
                f" up to {frames_JPHW.max():g}; {_OVERFLOW_ADVICE[dtype.name]}"
            )
        stored_JPHW = np.minimum(frames_JPHW, max_count).astype(dtype.newbyteorder("<"))
        return Encoded(
            stored_JPHW.tobytes(), {}, {"events": len(stream.t_N), "saturated": overflows}
        )


def frames(
    stream: Stream, slices: int, size: int, *, by: FramesBy = "time", resize: Resize = "sum"
) -> NDArray[np.float64]:
    """The frames of a recording: [J,P,H,W], H = W = size. They are counts, or means with "area".

    Raises: DataError if the recording has no events, or has events that are outside the sensor or
        the span, of another polarity than 0 and 1, or not in order of time.
    """
    t_N, y_N, x_N, p_N, (height, width), (begin, end) = stream
    require_data(len(t_N), "it holds no event")
    for name, values_N, low, high in (
        ("x", x_N, 0, width - 1),
        ("y", y_N, 0, height - 1),
        ("p", p_N, 0, 1),
        ("t", t_N, begin, end - 1),
    ):
        lowest, highest = values_N.min(), values_N.max()
        require_data(
            low <= lowest and highest <= high,
            f"{name} of its events must be in {low}..{high}; got {lowest} to {highest}",
        )
    require_data(not np.any(np.diff(t_N) < 0), "its events must be in order of time")
    if by == "time":
        slice_N = (t_N - begin) * slices // (end - begin)
    else:
        slice_N = np.arange(len(t_N)) * slices // len(t_N)
    h, w = height, width
    if resize == "sum":
        y_N, x_N = y_N * size // height, x_N * size // width
        h, w = size, size
    index_N = ((slice_N * 2 + p_N) * h + y_N) * w + x_N
    counts = np.bincount(index_N, minlength=slices * 2 * h * w)
    counts_JPhw = counts.reshape(slices, 2, h, w).astype(np.float64)
    if resize == "sum":
        return counts_JPhw
    rows_Hh, columns_Ww = _pixel_shares(height, size), _pixel_shares(width, size)
    return np.einsum("Yh,jphw,Xw->jpYX", rows_Hh, counts_JPhw, columns_Ww, optimize=True)


def sorted_stream(
    t_N: NDArray[np.int64],
    y_N: NDArray[np.int64],
    x_N: NDArray[np.int64],
    p_N: NDArray[np.int64],
    *,
    sensor: tuple[int, ...],
    span: tuple[int, int],
) -> Stream:
    """The events in order of time. Events at the same time keep their order."""
    order_N = np.argsort(t_N, kind="stable")
    t_N, y_N, x_N, p_N = (values_N[order_N] for values_N in (t_N, y_N, x_N, p_N))
    return Stream(t_N, y_N, x_N, p_N, (sensor[0], sensor[1]), span)


def _pixel_shares(sensor: int, size: int) -> NDArray[np.float64]:
    """Cut a line of `sensor` pixels into `size` equal parts: the share of each pixel in each part.

    The result is [size, sensor]. The shares of a part sum to 1.
    """
    edges = np.arange(size + 1) * sensor / size
    low = np.maximum(edges[:-1, None], np.arange(sensor))
    high = np.minimum(edges[1:, None], np.arange(1, sensor + 1))
    return np.maximum(0.0, high - low) * size / sensor
