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

Saccades over still images: an event camera that looks at a picture and moves its gaze three
times, as for N-MNIST.

The picture stands in the middle of the sensor, and the gaze goes round a triangle, each side in 100
ms. The class can be told from counts summed over time as well: this set asks no network to use
time, it gives real images to networks for events.

Source: Orchard et al. 2015, doi:10.3389/fnins.2015.00437 (the way of recording; path, speed and
camera here are ours).

A simulated event camera: a film of intensities to the events that it would give.

Each pixel remembers a level. Whenever the intensity has moved away from it by `threshold`, the
pixel gives an event, on or off, and the level follows by one threshold. Sums, products and
comparisons alone, so the same events come out on every machine.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import DataError
from pipeline.core.random import below, bits
from pipeline.data.write.recordings import Stream, in_order

# M instants of a film, N events, H W pixels


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
class MovingShape:
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
        stream = moving_shape_events(
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
        return add_noise(
            stream, bits(self.content_seed, self.part, self.number, _NOISE + np.arange(4 * noise))
        )

    def _draw(self, number: int, many: int) -> int:
        return int(below(bits(self.content_seed, self.part, self.number, number), many))

    def __str__(self) -> str:
        return f"moving recording {self.number}"


def moving_shape_events(
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
    stream = film_to_events(
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
        0.5 - signed_distance(shape, down_MH[:, :, None], right_MW[:, None, :], radius), 0.0, 1.0
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


def signed_distance(
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


# M instants of a film, N events, H W pixels of the sensor, h w of the picture


CORNERS = ((-3, -3), (3, 0), (-3, 3))  # (down, right) of the gaze from the middle, in pixels
SACCADE_US, SACCADE_INSTANTS = (
    100_000,
    25,
)  # of each side: about 6 pixels, a quarter of one between two instants
SACCADE_THRESHOLD = 0.15  # of black to white

_SACCADE_NOISE_COUNT, _SACCADE_NOISE = 768, 1024  # draws, see random.py


@dataclass(frozen=True, eq=False)
class Saccades:
    """The picture `image_hw` (uint8), number `number` of a part (0 train, 1 val), seen by a sensor
    of `size` pixels a side.
    """

    image_hw: NDArray[np.uint8]
    label: int
    number: int
    part: int
    size: int = 34
    content_seed: int = 0

    def __post_init__(self) -> None:
        if self.size < max(self.image_hw.shape):
            raise DataError(
                f"saccades: size must be the picture's {max(self.image_hw.shape)} pixels or more;"
                f" got {self.size}"
            )

    def events(self) -> Stream:
        stream = film_to_events(
            self._film(), threshold=SACCADE_THRESHOLD, step_us=SACCADE_US // SACCADE_INSTANTS
        )
        noise = 50 + int(
            below(bits(self.content_seed, self.part, self.number, _SACCADE_NOISE_COUNT), 51)
        )
        return add_noise(
            stream,
            bits(self.content_seed, self.part, self.number, _SACCADE_NOISE + np.arange(4 * noise)),
        )

    def _film(self) -> NDArray[np.float64]:
        """What the sensor sees at each instant, in 0..1, between pixels by linear interpolation:
        [M,H,W].
        """
        height, width = self.image_hw.shape
        reach = max(abs(step) for corner in CORNERS for step in corner) + 1
        field = np.zeros((self.size + 2 * reach, self.size + 2 * reach))
        top, left = (len(field) - height) // 2, (len(field) - width) // 2
        field[top : top + height, left : left + width] = self.image_hw / 255.0
        return np.stack(
            [_window(field, reach + down, reach + right, self.size) for down, right in gaze()]
        )

    def __str__(self) -> str:
        return f"saccades over picture {self.number}"


def gaze() -> list[tuple[float, float]]:
    """Where the gaze is at each instant, (down, right) in pixels: round the triangle and back to
    its first corner.
    """
    path: list[tuple[float, float]] = [CORNERS[0]]
    for (down, right), (next_down, next_right) in zip(
        CORNERS, (*CORNERS[1:], CORNERS[0]), strict=True
    ):
        for instant in range(1, SACCADE_INSTANTS + 1):
            part = instant / SACCADE_INSTANTS
            path.append((down + part * (next_down - down), right + part * (next_right - right)))
    return path


def _window(field: NDArray[np.float64], top: float, left: float, size: int) -> NDArray[np.float64]:
    """`size` x `size` values of `field` from (top, left) on, which may lie between its pixels."""
    row, column = int(top), int(left)
    down, right = top - row, left - column
    upper = (1 - down) * field[row : row + size] + down * field[row + 1 : row + 1 + size]
    return (1 - right) * upper[:, column : column + size] + right * upper[
        :, column + 1 : column + 1 + size
    ]


# M instants of a film, N events, H W pixels


def film_to_events(film_MHW: NDArray[np.float64], *, threshold: float, step_us: int) -> Stream:
    """The events between the instants of a film, which lie `step_us` microseconds apart.

    The n events of a pixel between two instants are spread evenly between them.
    """
    moved_MHW = np.zeros((len(film_MHW) - 1, *film_MHW.shape[1:]))
    level_HW = film_MHW[0].copy()
    for instant in range(len(moved_MHW)):
        moved_MHW[instant] = np.trunc((film_MHW[instant + 1] - level_HW) / threshold)
        level_HW += moved_MHW[instant] * threshold
    m_K, y_K, x_K = np.nonzero(
        moved_MHW
    )  # K times that a pixel moved, each by one threshold or more
    moved_K = moved_MHW[m_K, y_K, x_K].astype(np.int64)
    many_K = np.abs(moved_K)
    nth_N = np.arange(many_K.sum()) - np.repeat(np.cumsum(many_K) - many_K, many_K)
    m_N, y_N, x_N, many_N, moved_N = np.repeat(
        np.stack([m_K, y_K, x_K, many_K, moved_K]), many_K, axis=1
    )
    t_N = m_N * step_us + (2 * nth_N + 1) * step_us // (2 * many_N)
    p_N = (moved_N > 0).astype(np.int64)
    return in_order(
        t_N, y_N, x_N, p_N, sensor=film_MHW.shape[1:], span=(0, (len(film_MHW) - 1) * step_us)
    )


def add_noise(stream: Stream, random_bits: NDArray[np.uint64]) -> Stream:
    """The events and others that come from nowhere, anywhere at any time: one for every four
    numbers of `random_bits`.
    """
    begin, end = stream.span
    t_K, y_K, x_K, p_K = (
        below(bits_K, many)
        for bits_K, many in zip(
            random_bits.reshape(-1, 4).T, (end - begin, *stream.sensor, 2), strict=True
        )
    )
    pairs = zip(
        (stream.t_N, stream.y_N, stream.x_N, stream.p_N), (begin + t_K, y_K, x_K, p_K), strict=True
    )
    return in_order(
        *(np.concatenate(pair) for pair in pairs), sensor=stream.sensor, span=stream.span
    )
