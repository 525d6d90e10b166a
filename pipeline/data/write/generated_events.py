"""Generated recordings of a simulated event camera: moving shapes, and saccades over still images.

**Moving shapes** has 16 classes: four shapes (disc, square, triangle, cross), each in four
directions. A network without memory can tell the shapes apart, but not a direction from its
opposite.

A shape moves along a row or a column of a toroidal sensor: it leaves on one side and enters on the
other. It starts at a random place. Each axis has one base recording. The opposite direction is its
exact reversal in time. Then a fair coin f flips the polarity of each recording:

    (t, y, x, p)  ->  (end - 1 - t, y, x, p),            then    p -> p XOR f

Two kinds of readers therefore recognise the direction along an axis with at most 50 % accuracy:

    sums over time   The sum of a recording over time equals the sum of its reversal.
    single moments   At any time the shape is equally likely at every place. One slice of the base
                     is then distributed like any other, and the slices of a reversal are those of
                     a base in reverse order. Neither a slice nor its time reveals the direction.

Only the succession of slices shows the direction, so a network must carry information from one
slice to the next. Without the coin and the exact reversal, polarity would reveal the direction: a
moving edge has the other polarity in the reversal, and a camera's hysteresis shows which polarity
came first. A camera that is switched on during the motion would miss the first events and reveal
the beginning; this one has been on since before the shape arrived.

**Saccades** turns real images into input for event networks. Sums over time suffice to distinguish
its classes. The picture is in the middle of the sensor. The gaze follows a triangle, and each side
takes 100 ms, as for N-MNIST.

Every number is a pure function of (content seed, part, number of the recording).

Source: Orchard et al. 2015, doi:10.3389/fnins.2015.00437, for saccades (path, speed and camera
differ).
"""

# M instants of a film, N events, H W pixels of the sensor, h w of a picture

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import require_data
from pipeline.core.random import below, bits
from pipeline.data.write.recordings import Stream, in_order

SHAPES = ("disc", "square", "triangle", "cross")
DIRECTIONS = ("right", "left", "down", "up")  # the index is 2 * axis + is_reversed
CLASSES = [f"{shape} {direction}" for shape in SHAPES for direction in DIRECTIONS]
INSTANTS, STEP_US = 93, 1000  # 92 ms
SMALLEST = 16  # pixels a side of the smallest sensor with room for the shapes

# Draws, see random.py: 256.. of the film, 512.. of the noise.
_RADIUS, _ACROSS, _START, _SPEED, _THRESHOLD, _COIN, _NOISE_COUNT = range(256, 263)
_NOISE = 512


@dataclass(frozen=True)
class MovingShape:
    """Recording `number` of a part (0 train, 1 val). Its class is `number % 16`."""

    number: int
    part: int
    size: int = 34
    content_seed: int = 0

    def __post_init__(self) -> None:
        require_data(
            self.size >= SMALLEST,
            f"moving events: size must be {SMALLEST} or more pixels; got {self.size}",
        )

    @property
    def label(self) -> int:
        return self.number % len(CLASSES)

    def events(self) -> Stream:
        shape, direction = divmod(self.label, len(DIRECTIONS))
        axis, is_reversed = divmod(direction, 2)
        base = self.base(shape, axis)
        stream = reversal(base) if is_reversed else base
        return stream._replace(p_N=stream.p_N ^ _draw(self, _COIN, 2))

    def base(self, shape: int, axis: int) -> Stream:
        """The noisy recording before reversal and coin, along `axis` (0 right, 1 down)."""
        scale = self.size / 34
        stream = moving_shape_events(
            SHAPES[shape],
            axis,
            size=self.size,
            radius=scale * (4.5 + _draw(self, _RADIUS, 64) / 32),  # 4.5 to 6.5 pixels on 34
            across=self.size * _draw(self, _ACROSS, 1 << 16) / (1 << 16),
            start=self.size * _draw(self, _START, 1 << 16) / (1 << 16),
            speed=scale * (112 + _draw(self, _SPEED, 93)) / 1024,  # 10 to 18 pixels in total
            threshold=0.2 + 0.01 * _draw(self, _THRESHOLD, 11),
        )
        return add_noise(stream, self, 100 + _draw(self, _NOISE_COUNT, 101), first_draw=_NOISE)

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
    """The events of a shape that moves along `axis` (0 to the right, 1 down) at `speed` pixels per
    instant.

    At time 0 its centre is at `start` along the axis and at `across` on the other one, in pixels on
    a torus of `size` a side. An event occurs whenever the intensity (0 outside, 1 inside) has
    changed by `threshold`.

    The film begins empty, and the shape first moves until it has left its first place. The level
    that a pixel remembers at time 0 then depends on the motion, not on the beginning of the film.
    """
    before = math.ceil(
        (2.2 * radius + 2) / speed
    )  # instants until the largest shape, with its soft edge, has left
    along_M = start + speed * np.arange(-before, INSTANTS, dtype=np.float64)
    across_M = np.full_like(along_M, across)
    y_M, x_M = (across_M, along_M) if axis == 0 else (along_M, across_M)
    pixels = np.arange(size, dtype=np.float64)
    # the shorter signed distance on a ring of `size` pixels: -size/2 up to size/2
    down_MH, right_MW = (
        (pixels - middle_M[:, None] + size / 2) % size - size / 2 for middle_M in (y_M, x_M)
    )
    distance_MHW = signed_distance(shape, down_MH[:, :, None], right_MW[:, None, :], radius)
    film_MHW = np.clip(0.5 - distance_MHW, 0.0, 1.0)  # with an edge one pixel wide
    # In units of the threshold, so that levels are whole numbers and exactly 0 after the shape has
    # left a pixel.
    stream = film_to_events(
        np.concatenate([np.zeros((1, size, size)), film_MHW / threshold]),
        threshold=1.0,
        step_us=STEP_US,
    )
    begin = (1 + before) * STEP_US
    t_N, y_N, x_N, p_N = (values_N[stream.t_N >= begin] for values_N in stream[:4])
    return Stream(t_N - begin, y_N, x_N, p_N, stream.sensor, (0, (INSTANTS - 1) * STEP_US))


def reversal(stream: Stream) -> Stream:
    """The recording reversed in time, with the same polarities."""
    t_N, y_N, x_N, p_N = (values_N[::-1] for values_N in stream[:4])
    return stream._replace(t_N=sum(stream.span) - 1 - t_N, y_N=y_N, x_N=x_N, p_N=p_N)


def signed_distance(
    shape: str, down: NDArray[np.float64], right: NDArray[np.float64], radius: float
) -> NDArray[np.float64]:
    """The distance in pixels from a point to a shape, negative inside it.

    (down, right): the point relative to the shape's centre.
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


# ---------------------------------------------------------------------------------------- saccades


CORNERS = ((-3, -3), (3, 0), (-3, 3))  # (down, right) of the gaze from the middle, in pixels
# Each side takes this long. It is about 6 pixels, a quarter of a pixel between two instants.
SACCADE_US, SACCADE_INSTANTS = 100_000, 25
SACCADE_THRESHOLD = 0.15  # as a share of the step from black to white

_SACCADE_NOISE_COUNT, _SACCADE_NOISE = 768, 1024  # draws, see random.py


@dataclass(frozen=True, eq=False)
class Saccades:
    """A saccade recording of the picture `image_hw` (uint8) by a sensor of `size` pixels a side.

    `number` is its number in a part (0 train, 1 val).
    """

    image_hw: NDArray[np.uint8]
    label: int
    number: int
    part: int
    size: int = 34
    content_seed: int = 0

    def __post_init__(self) -> None:
        require_data(
            self.size >= max(self.image_hw.shape),
            f"saccades: size must be the picture's {max(self.image_hw.shape)} pixels or more;"
            f" got {self.size}",
        )

    def events(self) -> Stream:
        height, width = self.image_hw.shape
        reach = max(abs(step) for corner in CORNERS for step in corner) + 1
        field = np.zeros((self.size + 2 * reach, self.size + 2 * reach))
        top, left = (len(field) - height) // 2, (len(field) - width) // 2
        field[top : top + height, left : left + width] = self.image_hw / 255.0
        views = [_view(field, reach + down, reach + right, self.size) for down, right in gaze()]
        stream = film_to_events(
            np.stack(views),  # the intensity at each instant, in 0..1
            threshold=SACCADE_THRESHOLD,
            step_us=SACCADE_US // SACCADE_INSTANTS,
        )
        noise = 50 + _draw(self, _SACCADE_NOISE_COUNT, 51)
        return add_noise(stream, self, noise, first_draw=_SACCADE_NOISE)

    def __str__(self) -> str:
        return f"saccades over picture {self.number}"


def gaze() -> NDArray[np.float64]:
    """The position of the gaze at each instant, (down, right) in pixels: [instants, 2].

    It goes around the triangle and back to the first corner.
    """
    corners = np.array([*CORNERS, CORNERS[0]], np.float64)
    parts = np.arange(1, SACCADE_INSTANTS + 1)[:, None] / SACCADE_INSTANTS
    sides = [begin + parts * (end - begin) for begin, end in pairwise(corners)]
    return np.concatenate([corners[:1], *sides])


def _view(field: NDArray[np.float64], top: float, left: float, size: int) -> NDArray[np.float64]:
    """`size` x `size` interpolated values of `field`, starting at (top, left)."""
    row, column = int(top), int(left)
    down, right = top - row, left - column
    upper = (1 - down) * field[row : row + size] + down * field[row + 1 : row + 1 + size]
    return (1 - right) * upper[:, column : column + size] + right * upper[
        :, column + 1 : column + 1 + size
    ]


# ------------------------------------------------------------------------------------------ camera


def film_to_events(film_MHW: NDArray[np.float64], *, threshold: float, step_us: int) -> Stream:
    """The events of an event camera that sees a film of intensities.

    Instants are `step_us` microseconds apart. Each pixel remembers a level. Whenever the intensity
    differs from it by `threshold`, the pixel emits an event, on or off, and the level follows by
    one threshold. The n events of a pixel between two instants are spread evenly. Only sums,
    products and comparisons are used, so the events are the same on every machine.
    """
    moved_MHW = np.zeros((len(film_MHW) - 1, *film_MHW.shape[1:]))
    level_HW = film_MHW[0].copy()
    for instant in range(len(moved_MHW)):
        moved_MHW[instant] = np.trunc((film_MHW[instant + 1] - level_HW) / threshold)
        level_HW += moved_MHW[instant] * threshold
    # K changes of a pixel, each by one threshold or more
    m_K, y_K, x_K = np.nonzero(moved_MHW)
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


def add_noise(
    stream: Stream, recording: MovingShape | Saccades, count: int, *, first_draw: int
) -> Stream:
    """Add `count` noise events to a recording, at uniform places and times."""
    begin, end = stream.span
    draws = first_draw + np.arange(4 * count).reshape(-1, 4).T
    many = (end - begin, *stream.sensor, 2)
    t_K, y_K, x_K, p_K = (_draw(recording, *pair) for pair in zip(draws, many, strict=True))
    pairs = zip(stream[:4], (begin + t_K, y_K, x_K, p_K), strict=True)
    return in_order(
        *(np.concatenate(pair) for pair in pairs), sensor=stream.sensor, span=stream.span
    )


def _draw(recording: MovingShape | Saccades, number: Any, many: int) -> Any:
    """A whole number 0..many-1 for the draw `number`, or for each of an array of draws."""
    drawn = bits(recording.content_seed, recording.part, recording.number, number)
    return below(drawn, many)
