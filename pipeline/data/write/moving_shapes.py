"""Moving shapes, 16 classes of which only memory can tell apart more than pairs: four shapes, each
in four directions.

A shape - disc, square, triangle, cross - moves along a row or a column of a sensor without ends:
what leaves on one side comes in on the other. It starts anywhere. One recording of each axis is the
base; the opposite direction is its exact reversal in time,

    (t, y, x, p)  ->  (end - 1 - t, y, x, p),            then in every recording    p -> p XOR f
    with a fair coin f.

So two kinds of reader are right half of the time at most, as to the direction along the axis:

    of sums      The sum of a recording over time is the sum of its reversal.
    of a moment  The shape is as likely at one place as at another, at any time. What is seen of the
                 base in one slice is then distributed as what is seen in any other, and the slices
                 of a reversal are those of a base, last first: neither a slice nor the time of it
                 says which way it was played.

The direction shows in how one slice follows another, and whoever tells it has carried something
from the one to the other. (A moving edge gives the reversal the other polarity; and a camera's
hysteresis shows which polarity came first. The coin and the exact reversal take either clue away. A
camera switched on amid the motion would miss the first events, and so show where time began: this
one has been on since the shape was elsewhere.)

Every number is a pure function of (content seed, part, number of the recording).
"""

# M instants of a film, N events, H W pixels

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.core.random import below, bits
from pipeline.data.errors import DataError
from pipeline.data.write.event_camera import watch, with_noise
from pipeline.data.write.recordings import Stream

SHAPES = ("disc", "square", "triangle", "cross")
DIRECTIONS = ("right", "left", "down", "up")  # 2 axis + reversed
CLASSES = [f"{shape} {direction}" for shape in SHAPES for direction in DIRECTIONS]
INSTANTS, STEP_US = 93, 1000  # 92 ms
SMALLEST = 16  # pixels a side: a smaller sensor has no room for the shapes

_FIRST_DRAW = 256  # draws, see random.py: 256.. of the film, 512.. of the noise
_RADIUS, _ACROSS, _START, _SPEED, _THRESHOLD, _COIN, _NOISE_COUNT = range(
    _FIRST_DRAW, _FIRST_DRAW + 7
)
_NOISE = 512


@dataclass(frozen=True)
class Moving:
    """Recording `number` of a part (0 train, 1 val), of class `number % 16`."""

    number: int
    part: int
    size: int = 34
    content_seed: int = 0

    def __post_init__(self) -> None:
        if self.size < SMALLEST:
            raise DataError(
                f"moving events: size must be {SMALLEST} or more pixels; got {self.size}"
            )

    @property
    def label(self) -> int:
        return self.number % len(CLASSES)

    def events(self) -> Stream:
        shape, direction = divmod(self.label, len(DIRECTIONS))
        axis, is_reversed = divmod(direction, 2)
        stream = self.base(shape, axis)
        if is_reversed:
            stream = reversal(stream)
        return stream._replace(p_N=stream.p_N ^ self._draw(_COIN, 2))

    def base(self, shape: int, axis: int) -> Stream:
        """The recording before reversal and coin: along `axis` (0 to the right, 1 down), noise
        included.
        """
        scale = self.size / 34
        stream = seen(
            SHAPES[shape],
            axis,
            size=self.size,
            radius=scale * (4.5 + self._draw(_RADIUS, 64) / 32),  # 4.5 to 6.5 pixels on 34
            across=self.size * self._draw(_ACROSS, 1 << 16) / (1 << 16),
            start=self.size * self._draw(_START, 1 << 16) / (1 << 16),
            speed=scale * (112 + self._draw(_SPEED, 93)) / 1024,  # 10 to 18 pixels of way
            threshold=0.2 + 0.01 * self._draw(_THRESHOLD, 11),
        )
        noise = 100 + self._draw(_NOISE_COUNT, 101)
        return with_noise(
            stream, bits(self.content_seed, self.part, self.number, _NOISE + np.arange(4 * noise))
        )

    def _draw(self, number: int, many: int) -> int:
        return int(below(bits(self.content_seed, self.part, self.number, number), many))

    def __str__(self) -> str:
        return f"moving recording {self.number}"


def seen(
    shape: str,
    axis: int,
    *,
    size: int,
    radius: float,
    across: float,
    start: float,
    speed: float,
    threshold: float,
) -> Stream:
    """The events of a shape that moves along `axis` (0 to the right, 1 down) at `speed` pixels an
    instant.

    At time 0 its middle is at `start` along the axis and at `across` on the other, pixels on a
    torus of `size` a side; an event comes whenever the intensity (0 outside, 1 within) has moved by
    `threshold`.

    The camera first sees nothing, then the shape, for as long as it takes to leave where it was:
    what a pixel remembers at time 0 is then what the motion has left there, not where the film
    began.
    """
    before = math.ceil((2.2 * radius + 2) / speed)  # no shape is longer, soft edge included
    along_M = start + speed * np.arange(-before, INSTANTS, dtype=np.float64)
    across_M = np.full_like(along_M, across)
    y_M, x_M = (across_M, along_M) if axis == 0 else (along_M, across_M)
    film_MHW = _film(shape, y_M, x_M, size=size, radius=radius)
    # In units of the threshold, so that levels are whole numbers and a pixel that the shape has
    # left is back at 0 exactly.
    stream = watch(
        np.concatenate([np.zeros((1, size, size)), film_MHW / threshold]),
        threshold=1.0,
        step_us=STEP_US,
    )
    begin = (1 + before) * STEP_US
    late = stream.t_N >= begin
    t_N, y_N, x_N, p_N = (
        values_N[late] for values_N in (stream.t_N - begin, stream.y_N, stream.x_N, stream.p_N)
    )
    return Stream(t_N, y_N, x_N, p_N, stream.sensor, (0, (INSTANTS - 1) * STEP_US))


def _film(
    shape: str, y_M: NDArray[np.float64], x_M: NDArray[np.float64], *, size: int, radius: float
) -> NDArray[np.float64]:
    """The shape at each instant, in 0..1, its edge a pixel soft: [M,H,W]."""
    pixels = np.arange(size, dtype=np.float64)
    down_MH, right_MW = (_ring(pixels - middle_M[:, None], size) for middle_M in (y_M, x_M))
    return np.clip(
        0.5 - outside(shape, down_MH[:, :, None], right_MW[:, None, :], radius), 0.0, 1.0
    )


def _ring(distance: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """The distance on a ring of `size` pixels, the shorter way: -size/2 up to size/2."""
    return (distance + size / 2) % size - size / 2


def reversal(stream: Stream) -> Stream:
    """The recording played backwards, polarities kept."""
    begin, end = stream.span
    t_N, y_N, x_N, p_N = (
        values_N[::-1]
        for values_N in (begin + end - 1 - stream.t_N, stream.y_N, stream.x_N, stream.p_N)
    )
    return Stream(t_N, y_N, x_N, p_N, stream.sensor, stream.span)


def outside(
    shape: str, down: NDArray[np.float64], right: NDArray[np.float64], radius: float
) -> NDArray[np.float64]:
    """How far, in pixels, a point lies outside a shape (negative within); (down, right) from its
    middle.
    """
    if shape == "disc":
        return np.sqrt(down * down + right * right) - radius
    if shape == "square":
        return np.maximum(np.abs(down), np.abs(right)) - 0.9 * radius
    if shape == "triangle":  # upright, equilateral: three half-planes at the distance of radius / 2
        slanted = 0.5 * np.sqrt(3.0) * np.abs(right) - 0.5 * down
        return np.maximum(down, slanted) - 0.6 * radius
    bar = 0.35 * radius
    upright = np.maximum(np.abs(right) - bar, np.abs(down) - 1.1 * radius)
    level = np.maximum(np.abs(down) - bar, np.abs(right) - 1.1 * radius)
    return np.minimum(upright, level)
