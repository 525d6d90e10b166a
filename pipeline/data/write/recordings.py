"""Turns the events of a recording into frames of counts, and encodes them.

    F[j, p, y, x] = number of events of polarity p at (y, x) in slice j        j = 0..slices-1

With "time", slices have equal length: j = floor((t - begin) slices / (end - begin)). With "number",
they have equal numbers of events: the i-th of N events is in slice floor(i slices / N). Both nest:
two adjacent slices of 2n make one of n. A file with many slices can therefore be read with any
number of slices that divides theirs.

There are two ways to resize a recording. With "sum", an event at x falls on pixel
floor(x size / width), so counts stay whole and none is lost. With "area", a pixel is the mean count
of the sensor pixels that it covers, weighted by the covered area and stored as float16. These
values do not grow with the sensor, like those of the interpolated frames that published recipes
normalise.
"""

# N events of a recording, J slices, P polarities (0 off, 1 on), h w of the sensor, H W of a frame

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import require_data
from pipeline.data.ffcv.format import Arrays
from pipeline.data.write.writer import Encoded

By = Literal["time", "number"]
Resize = Literal["sum", "area"]
MOST_SLICES = 1000


class Stream(NamedTuple):
    """The events of a recording, sorted by time."""

    t_N: NDArray[np.int64]  # microseconds, begin <= t < end
    y_N: NDArray[np.int64]
    x_N: NDArray[np.int64]
    p_N: NDArray[np.int64]  # 0 darker, 1 brighter
    sensor: tuple[int, int]  # height, width in pixels
    span: tuple[int, int]  # begin, end in microseconds


@dataclass(frozen=True, kw_only=True)
class Framing:
    """Encodes recordings as `slices` frames of `size` x `size` pixels with two polarities.

    `events()` of a recording reads or generates its Stream. It raises OSError or ValueError if the
    recording is damaged.

    Args:
        counts: "uint8" up to 255, or "int16" up to 32767. It has no effect with "area", which
            stores float16.
        overflow: refuse a recording with a larger count, or saturate it and record that in the
            manifest.

    Raises:
        DataError: an option is out of range, or options contradict each other.
    """

    slices: int
    size: int
    frames_by: By = "time"
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
            1 <= self.slices <= MOST_SLICES and self.size >= 1,
            f"write events: slices must be in 1..{MOST_SLICES}, size 1 or more; got"
            f" slices={self.slices}, size={self.size}",
        )
        require_data(
            self.resize != "area" or (self.counts, self.overflow) == ("uint8", "refuse"),
            "write events: counts and overflow have no effect with resize='area', which stores"
            " float16",
        )

    @property
    def kind(self) -> Arrays:
        dtype = "float16" if self.resize == "area" else self.counts
        return Arrays(dtype, (self.slices, 2, self.size, self.size))

    def __call__(self, recording: Any) -> Encoded | str:
        try:
            stream = recording.events()
            frames_JPHW = frames(
                stream, self.slices, self.size, by=self.frames_by, resize=self.resize
            )
        except (OSError, ValueError) as error:
            return str(error)
        dtype = np.dtype(self.kind.dtype)
        most = np.finfo(dtype).max if dtype.kind == "f" else np.iinfo(dtype).max
        beyond = int(np.count_nonzero(frames_JPHW > most))
        if beyond and self.overflow == "refuse":
            return (
                f"{beyond} counts beyond {dtype}, the largest {frames_JPHW.max():g}; "
                "store int16, cut more slices, or let them saturate"
            )
        stored_JPHW = np.minimum(frames_JPHW, most).astype(dtype.newbyteorder("<"))
        return Encoded(stored_JPHW.tobytes(), {}, {"events": len(stream.t_N), "saturated": beyond})


def frames(
    stream: Stream, slices: int, size: int, *, by: By = "time", resize: Resize = "sum"
) -> NDArray[np.float64]:
    """The counts of a recording: [J,P,H,W], H = W = size.

    Raises: DataError for a recording without events, or with events outside the sensor or the span.
    """
    t_N, y_N, x_N, p_N, (height, width), (begin, end) = stream
    require_data(len(t_N), "it holds no event")
    for name, values_N, low, high in (
        ("x", x_N, 0, width - 1),
        ("y", y_N, 0, height - 1),
        ("p", p_N, 0, 1),
        ("t", t_N, begin, end - 1),
    ):
        least, most = values_N.min(), values_N.max()
        require_data(
            least >= low and most <= high,
            f"{name} of its events must be in {low}..{high}; got {least} to {most}",
        )
    require_data(not np.any(np.diff(t_N) < 0), "its events must be in order of time")
    if by == "time":
        slice_N = (t_N - begin) * slices // (end - begin)
    else:
        slice_N = np.arange(len(t_N)) * slices // len(t_N)
    h, w = height, width
    if resize == "sum":
        y_N, x_N, h, w = y_N * size // height, x_N * size // width, size, size
    place_N = ((slice_N * 2 + p_N) * h + y_N) * w + x_N
    counts = np.bincount(place_N, minlength=slices * 2 * h * w)
    counts_JPhw = counts.reshape(slices, 2, h, w).astype(np.float64)
    if resize == "sum":
        return counts_JPhw
    rows_Hh, columns_Ww = _covered(height, size), _covered(width, size)
    return np.einsum("Yh,jphw,Xw->jpYX", rows_Hh, counts_JPhw, columns_Ww, optimize=True)


def in_order(
    t_N: NDArray[np.int64],
    y_N: NDArray[np.int64],
    x_N: NDArray[np.int64],
    p_N: NDArray[np.int64],
    *,
    sensor: tuple[int, ...],
    span: tuple[int, int],
) -> Stream:
    """The events sorted by time. The sort is stable."""
    order_N = np.argsort(t_N, kind="stable")
    t_N, y_N, x_N, p_N = (values_N[order_N] for values_N in (t_N, y_N, x_N, p_N))
    return Stream(t_N, y_N, x_N, p_N, (sensor[0], sensor[1]), span)


def _covered(sensor: int, size: int) -> NDArray[np.float64]:
    """The share of each sensor pixel in each of `size` equal parts of a line: [size, sensor].

    Rows sum to 1.
    """
    edges = np.arange(size + 1) * sensor / size
    low = np.maximum(edges[:-1, None], np.arange(sensor))
    high = np.minimum(edges[1:, None], np.arange(1, sensor + 1))
    return np.maximum(0.0, high - low) * size / sensor
