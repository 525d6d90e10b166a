"""Moving shapes, 16 classes of which only time can tell apart more than pairs: four shapes, each in four directions.

A shape - disc, square, triangle, cross - crosses the sensor along a row or a column. One recording of each axis is the base; the
opposite direction is its exact reversal in time,

    (t, y, x, p)  ->  (end - 1 - t, y, x, p),            then in every recording    p -> p XOR f    with a fair coin f.

So the sum of a recording over time is the sum of its reversal: counts that were summed over time say nothing of the direction
along the axis, and no classifier of them is right more than half of the time. (A moving edge gives the reversal the other
polarity; and a camera's hysteresis shows which polarity came first. The coin and the exact reversal take either clue away.)

Every number is a pure function of (content seed, part, number of the recording).
"""

# M instants of a film, N events, H W pixels

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.errors import DataError
from pipeline.data.events.camera import watch, with_noise
from pipeline.data.events.frames import Stream
from pipeline.data.random import below, bits

SHAPES = ("disc", "square", "triangle", "cross")
DIRECTIONS = ("right", "left", "down", "up")  # 2 axis + reversed
CLASSES = [f"{shape} {direction}" for shape in SHAPES for direction in DIRECTIONS]
INSTANTS, STEP_US = 93, 1000  # 92 ms
SMALLEST = 16  # pixels a side: a smaller sensor has no room for the shapes

_FIRST_DRAW = 256  # draws, see random.py: 256.. of the film, 512.. of the noise
_RADIUS, _ACROSS, _START, _LENGTH, _THRESHOLD, _COIN, _NOISE_COUNT = range(_FIRST_DRAW, _FIRST_DRAW + 7)
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
            raise DataError(f"moving events: size must be {SMALLEST} or more pixels; got {self.size}")

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
        """The recording before reversal and coin: along `axis` (0 to the right, 1 down), noise included."""
        film_MHW = self._film(shape, axis)
        stream = watch(film_MHW, threshold=0.2 + 0.01 * self._draw(_THRESHOLD, 11), step_us=STEP_US)
        noise = 100 + self._draw(_NOISE_COUNT, 101)
        return with_noise(stream, bits(self.content_seed, self.part, self.number, _NOISE + np.arange(4 * noise)))

    def _film(self, shape: int, axis: int) -> NDArray[np.float64]:
        """The shape at each instant, in 0..1, its edge a pixel soft: [M,H,W]."""
        scale = self.size / 34
        radius = scale * (4.5 + self._draw(_RADIUS, 64) / 32)  # 4.5 to 6.5 pixels on 34
        across = scale * (self._draw(_ACROSS, 256) / 16 - 8)  # of the middle, to either side
        length = scale * (10 + self._draw(_LENGTH, 256) / 32)  # of the way
        start = -length / 2 + scale * (self._draw(_START, 256) / 32 - 4)
        middle, pixels = (self.size - 1) / 2, np.arange(self.size, dtype=np.float64)
        along_M = middle + start + length * np.arange(INSTANTS) / (INSTANTS - 1)
        y_M, x_M = (np.full(INSTANTS, middle + across), along_M) if axis == 0 else (along_M, np.full(INSTANTS, middle + across))
        down_MHW = pixels[None, :, None] - y_M[:, None, None]
        right_MHW = pixels[None, None, :] - x_M[:, None, None]
        return np.clip(0.5 - outside(SHAPES[shape], down_MHW, right_MHW, radius), 0.0, 1.0)

    def _draw(self, number: int, many: int) -> int:
        return int(below(bits(self.content_seed, self.part, self.number, number), many))

    def __str__(self) -> str:
        return f"moving recording {self.number}"


def reversal(stream: Stream) -> Stream:
    """The recording played backwards, polarities kept."""
    begin, end = stream.span
    t_N, y_N, x_N, p_N = (values_N[::-1] for values_N in (begin + end - 1 - stream.t_N, stream.y_N, stream.x_N, stream.p_N))
    return Stream(t_N, y_N, x_N, p_N, stream.sensor, stream.span)


def outside(shape: str, down: NDArray[np.float64], right: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    """How far, in pixels, a point lies outside a shape (negative within); (down, right) from its middle."""
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
