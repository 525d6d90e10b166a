"""Generated recordings of an event camera: moving shapes, pairs of flashes, saccades over images.

**Moving shapes** has 16 classes: four shapes (disc, square, triangle, cross), each in four
directions. A network without memory can tell the shapes apart, but not a direction from its
opposite.

A shape moves along a row or a column of a toroidal sensor: it leaves on one side and enters on the
other. It starts at a random place. A base recording moves to the right or down. A recording of the
opposite direction is the exact reversal in time of a base recording. In addition, a fair coin f
flips the polarities of each recording:

    reversal    (t, y, x, p) -> (end - 1 - t, y, x, p)
    coin        p -> p XOR f

Two kinds of networks therefore recognise the direction along an axis no better than chance (50 %):

    those that sum over time         The sum of a recording over time equals that of its reversal.
    those that see only one slice    The shape is at every place with the same probability, at any
                                     time. All slices of a base recording and of a reversal
                                     have the same distribution. So neither a slice nor its time
                                     shows the direction.

Only the order of the slices shows the direction, so a network must carry information from one slice
to the next. Without the coin, the order of the polarities at a pixel would show the direction: the
leading edge is on in a base recording and off in its reversal. Without the exact reversal, the
camera's hysteresis would show the direction, because it depends on which polarity came first. A
camera that is switched on too late would show it by the missing first events. This camera is on
before the shape arrives.

**Flashes** asks for credit over a chosen time. A shape flashes twice, in slices t and t + gap, once
in the left half of the sensor and once in the right half, with noise in all slices. A flash is
three events at each pixel of the shape, of one polarity. The 8 classes are four shapes, each with
either half first. t is random. Recordings 2 m and 2 m + 1 are the exact reversal of one another:
their slices are the same, in the opposite order. So any reader that maps
slices one by one, without their times, and sums gives both the same answer, of which at most one is
right. Times tell the order: the first flash is early more often than the second, and a sum over
slices that is weighted by their times tells which half was later. A network whose state starts at 0
can carry the time, too.

**Saccades** turns real images into input for event networks. Sums over time suffice to distinguish
its classes. The image is in the middle of the sensor. The gaze follows a triangle, and each side
takes 100 ms, as for N-MNIST.

Every random number is a pure function of (content seed, part, recording, number of the draw).

Source: Orchard et al. 2015, doi:10.3389/fnins.2015.00437, for saccades. Our path, speed and camera
differ from theirs.
"""

# M instants of a film, N events, K changes of a level or events of noise, H W pixels of the sensor,
# h w of an image

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import require_data
from pipeline.core.random import below, bits
from pipeline.data.write.recordings import Stream, sorted_stream

SHAPES = ("disc", "square", "triangle", "cross")
DIRECTIONS = ("right", "left", "down", "up")  # the index is 2 * axis + is_reversed
CLASSES = [f"{shape} {direction}" for shape in SHAPES for direction in DIRECTIONS]
INSTANTS, STEP_US = 93, 1000  # a recording takes 92 ms
MIN_SIZE = 16  # pixels a side of the smallest sensor with room for the shapes

# The numbers of the draws, see random.py. Moving shapes use 256 to 262, and 512 to 1311 for the
# noise. Flashes use 1536 to 1543, and 2048 upwards for the noise. Saccades use 768, and 1024 to
# 1423 for the noise. The kinds may share numbers, because no data set has several.
_RADIUS, _ACROSS, _START, _SPEED, _THRESHOLD, _COIN, _NOISE_COUNT = range(256, 263)
_NOISE = 512


class _Drawn:
    """A recording that is drawn."""

    number: int
    part: int
    content_seed: int

    @property
    def seed(self) -> int:
        return self.content_seed

    def draw(self, draw: Any, n: int) -> Any:
        """A whole number in 0..n-1 for the number of a draw, or for each in an array of them."""
        return below(bits(self.seed, self.part, self.number, draw), n)


@dataclass(frozen=True)
class MovingShape(_Drawn):
    """Recording `number` of a `part` (0 train, 1 val). Its class is `number % 16`."""

    number: int
    part: int
    size: int = 34
    content_seed: int = 0

    def __post_init__(self) -> None:
        require_data(
            self.size >= MIN_SIZE,
            f"moving events: size must be {MIN_SIZE} or more pixels; got {self.size}",
        )

    @property
    def label(self) -> int:
        return self.number % len(CLASSES)

    def events(self) -> Stream:
        shape, direction = divmod(self.label, len(DIRECTIONS))
        axis, is_reversed = divmod(direction, 2)
        base = self.base(shape, axis)
        stream = reversal(base) if is_reversed else base
        return stream._replace(p_N=stream.p_N ^ self.draw(_COIN, 2))

    def base(self, shape: int, axis: int) -> Stream:
        """The noisy base recording, before reversal and coin. `axis`: 0 right, 1 down."""
        scale = self.size / 34
        stream = moving_shape_events(
            SHAPES[shape],
            axis,
            size=self.size,
            radius=scale * (4.5 + self.draw(_RADIUS, 64) / 32),  # 4.5 to 6.5 pixels on 34
            across=self.size * self.draw(_ACROSS, 1 << 16) / (1 << 16),
            start=self.size * self.draw(_START, 1 << 16) / (1 << 16),
            speed=scale * (112 + self.draw(_SPEED, 93)) / 1024,  # 10 to 18 pixels in total
            threshold=0.2 + 0.01 * self.draw(_THRESHOLD, 11),
        )
        return add_noise(stream, self, 100 + self.draw(_NOISE_COUNT, 101), first_draw=_NOISE)

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
    """The events of a shape that moves along `axis` (0 right, 1 down), `speed` pixels per instant.

    At time 0 the centre of the shape is at `start` along the axis and at `across` on the other
    axis, in pixels on a torus of `size` a side. An event occurs whenever the intensity (0 outside,
    1 inside) has changed by `threshold`.

    The film starts before time 0 with an empty frame. By time 0 the shape has left its first place.
    The pixels' levels at time 0 therefore depend on the motion, not on the empty frame.
    """
    # the number of instants after which even the widest shape, with its soft edge, has left its
    # first place
    lead_in = math.ceil((2.2 * radius + 2) / speed)
    along_M = start + speed * np.arange(-lead_in, INSTANTS, dtype=np.float64)
    across_M = np.full_like(along_M, across)
    y_M, x_M = (across_M, along_M) if axis == 0 else (along_M, across_M)
    pixels = np.arange(size, dtype=np.float64)
    # the shorter signed distance on a ring of `size` pixels: -size/2 up to size/2
    down_MH, right_MW = (
        (pixels - middle_M[:, None] + size / 2) % size - size / 2 for middle_M in (y_M, x_M)
    )
    distance_MHW = signed_distance(shape, down_MH[:, :, None], right_MW[:, None, :], radius)
    film_MHW = np.clip(0.5 - distance_MHW, 0.0, 1.0)  # with an edge one pixel wide
    # The film is in units of the threshold: levels are then whole numbers, and exactly 0 after the
    # shape has left a pixel.
    stream = film_to_events(
        np.concatenate([np.zeros((1, size, size)), film_MHW / threshold]),
        threshold=1.0,
        step_us=STEP_US,
    )
    begin = (1 + lead_in) * STEP_US
    t_N, y_N, x_N, p_N = (values_N[stream.t_N >= begin] for values_N in stream[:4])
    return Stream(t_N - begin, y_N, x_N, p_N, stream.sensor, (0, (INSTANTS - 1) * STEP_US))


def reversal(stream: Stream) -> Stream:
    """The recording reversed in time, with the same polarities."""
    t_N, y_N, x_N, p_N = (values_N[::-1] for values_N in stream[:4])
    return stream._replace(t_N=sum(stream.span) - 1 - t_N, y_N=y_N, x_N=x_N, p_N=p_N)


def signed_distance(
    shape: str, down: NDArray[np.float64], right: NDArray[np.float64], radius: float
) -> NDArray[np.float64]:
    """The approximate signed distance in pixels from a point to the border of a shape.

    It is negative inside.

    (down, right): the point relative to the shape's centre.
    """
    if shape == "disc":
        return np.sqrt(down * down + right * right) - radius
    if shape == "square":
        return np.maximum(np.abs(down), np.abs(right)) - 0.9 * radius
    if shape == "triangle":  # upright: three edges, each 0.6 radius from the centre
        slanted = 0.5 * np.sqrt(3.0) * np.abs(right) - 0.5 * down
        return np.maximum(down, slanted) - 0.6 * radius
    bar = 0.35 * radius
    vertical = np.maximum(np.abs(right) - bar, np.abs(down) - 1.1 * radius)
    horizontal = np.maximum(np.abs(down) - bar, np.abs(right) - 1.1 * radius)
    return np.minimum(vertical, horizontal)


# ----------------------------------------------------------------------------------------- flashes


FLASH_CLASSES = [f"{shape}, {half} first" for shape in SHAPES for half in ("left", "right")]
FLASH_SLICE_US = 10_000
FLASH_EVENTS = 3  # of each pixel: a flash is three thresholds brighter or darker

_FLASH_SLICE, _FLASH_RADIUS, _FLASH_COIN, _FLASH_NOISE_COUNT = range(1536, 1540)
_FLASH_ROW, _FLASH_COLUMN = 1540, 1542  # and one more each, for the second flash
_FLASH_NOISE = 2048


@dataclass(frozen=True)
class Flashes(_Drawn):
    """Recording `number` of a `part` (0 train, 1 val): flashes in slices t and t + `gap` of
    `slices`. Its class is `number % 8`.
    """

    number: int
    part: int
    size: int = 34
    slices: int = 16
    gap: int = 4
    content_seed: int = 0

    def __post_init__(self) -> None:
        require_data(
            self.size >= MIN_SIZE,
            f"flashes: size must be {MIN_SIZE} or more pixels; got {self.size}",
        )
        require_data(
            0 < self.gap < self.slices,
            "flashes: gap must be in 1..slices - 1, as both flashes have a slice; got"
            f" gap={self.gap}, slices={self.slices}",
        )

    @property
    def label(self) -> int:
        return self.number % len(FLASH_CLASSES)

    @property
    def seed(self) -> int:
        # Sets of other slices and gaps do not have the same places and noise.
        return self.content_seed + 1024 * self.slices + self.gap

    def events(self) -> Stream:
        stream = replace(self, number=self.number - self.number % 2)._left_first()
        return reversal(stream) if self.number % 2 else stream

    def _left_first(self) -> Stream:
        """The noisy recording with the flash on the left first; `number` is even."""
        scale, half = self.size / 34, self.size / 2
        radius = scale * (4.5 + self.draw(_FLASH_RADIUS, 64) / 42)  # 4.5 to 6 pixels on 34
        pixels = np.arange(self.size, dtype=np.float64)
        # The shape lies within its half: the tip of a triangle is 1.2 radius from its centre.
        margin, shape = 1.2 * radius + 1, SHAPES[self.label // 2]
        first = int(self.draw(_FLASH_SLICE, self.slices - self.gap))
        parts = []
        for flash, slice_ in enumerate((first, first + self.gap)):
            row, column = (
                margin + (length - 2 * margin) * self.draw(draw + flash, 1 << 16) / (1 << 16)
                for draw, length in ((_FLASH_ROW, self.size), (_FLASH_COLUMN, half))
            )
            down_H1, right_1W = pixels[:, None] - row, pixels - (column + flash * half)
            y_N, x_N = np.nonzero(signed_distance(shape, down_H1, right_1W, radius) < 0)
            y_N, x_N = np.tile((y_N, x_N), FLASH_EVENTS)
            order_N = np.arange(len(y_N))
            t_N = slice_ * FLASH_SLICE_US + (2 * order_N + 1) * FLASH_SLICE_US // (2 * len(y_N))
            parts.append((t_N, y_N, x_N, np.full_like(y_N, self.draw(_FLASH_COIN, 2))))
        stream = sorted_stream(
            *(np.concatenate(columns) for columns in zip(*parts, strict=True)),
            sensor=(self.size, self.size),
            span=(0, self.slices * FLASH_SLICE_US),
        )
        count = self.slices * (20 + self.draw(_FLASH_NOISE_COUNT, 21))
        return add_noise(stream, self, int(count), first_draw=_FLASH_NOISE)

    def __str__(self) -> str:
        return f"flashes recording {self.number}"


# ---------------------------------------------------------------------------------------- saccades


CORNERS = ((-3, -3), (3, 0), (-3, 3))  # (down, right) of the gaze from the middle, in pixels
# for each side of about 6 pixels: the gaze moves a quarter of a pixel per instant
SACCADE_US, SACCADE_INSTANTS = 100_000, 25
SACCADE_THRESHOLD = 0.15  # the intensity is 0 for black and 1 for white

_SACCADE_NOISE_COUNT, _SACCADE_NOISE = 768, 1024  # see `_NOISE`


@dataclass(frozen=True, eq=False)
class Saccades(_Drawn):
    """Recording `number` of a `part` (0 train, 1 val): saccades over an image.

    `image_hw` is uint8. The sensor has `size` pixels a side.
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
            f"saccades: size must be at least {max(self.image_hw.shape)} pixels, the longer side of"
            f" the image; got {self.size}",
        )

    def events(self) -> Stream:
        height, width = self.image_hw.shape
        margin = max(abs(step) for corner in CORNERS for step in corner) + 1
        scene = np.zeros((self.size + 2 * margin, self.size + 2 * margin))
        top, left = (len(scene) - height) // 2, (len(scene) - width) // 2
        scene[top : top + height, left : left + width] = self.image_hw / 255.0
        film = [
            _interpolated_window(scene, margin + down, margin + right, self.size)
            for down, right in gaze_path()
        ]
        stream = film_to_events(
            np.stack(film),  # the intensity at each instant, in 0..1
            threshold=SACCADE_THRESHOLD,
            step_us=SACCADE_US // SACCADE_INSTANTS,
        )
        return add_noise(
            stream, self, 50 + self.draw(_SACCADE_NOISE_COUNT, 51), first_draw=_SACCADE_NOISE
        )

    def __str__(self) -> str:
        return f"saccades over image {self.number}"


def gaze_path() -> NDArray[np.float64]:
    """The position of the gaze at each instant, (down, right) in pixels: [instants, 2].

    The gaze moves around the triangle and back to the first corner.
    """
    corners = np.array([*CORNERS, CORNERS[0]], np.float64)
    shares = np.arange(1, SACCADE_INSTANTS + 1)[:, None] / SACCADE_INSTANTS
    sides = [begin + shares * (end - begin) for begin, end in pairwise(corners)]
    return np.concatenate([corners[:1], *sides])


def _interpolated_window(
    scene: NDArray[np.float64], top: float, left: float, size: int
) -> NDArray[np.float64]:
    """`size` x `size` linearly interpolated values of `scene`, starting at (top, left)."""
    row, column = int(top), int(left)
    down, right = top - row, left - column
    rows = (1 - down) * scene[row : row + size] + down * scene[row + 1 : row + 1 + size]
    left_part = (1 - right) * rows[:, column : column + size]
    return left_part + right * rows[:, column + 1 : column + 1 + size]


# ------------------------------------------------------------------------------------------ camera


def film_to_events(film_MHW: NDArray[np.float64], *, threshold: float, step_us: int) -> Stream:
    """The events of an event camera that sees a film of intensities.

    Instants are `step_us` microseconds apart. Each pixel remembers a level. Whenever the intensity
    differs from the level by `threshold`, the pixel emits an event, on or off, and the level
    changes by one threshold. The events of a pixel between two instants are spread evenly. Only
    basic arithmetic and comparisons are used, so the events are the same on every machine.
    """
    # the change of each level between two instants, in thresholds
    changes_MHW = np.zeros((len(film_MHW) - 1, *film_MHW.shape[1:]))
    level_HW = film_MHW[0].copy()
    for instant in range(len(changes_MHW)):
        changes_MHW[instant] = np.trunc((film_MHW[instant + 1] - level_HW) / threshold)
        level_HW += changes_MHW[instant] * threshold
    # K changes that are not 0; each makes `count` events
    m_K, y_K, x_K = np.nonzero(changes_MHW)
    change_K = changes_MHW[m_K, y_K, x_K].astype(np.int64)
    count_K = np.abs(change_K)
    # the position of each event among those of its change
    position_N = np.arange(count_K.sum()) - np.repeat(np.cumsum(count_K) - count_K, count_K)
    m_N, y_N, x_N, count_N, change_N = np.repeat(
        np.stack([m_K, y_K, x_K, count_K, change_K]), count_K, axis=1
    )
    t_N = m_N * step_us + (2 * position_N + 1) * step_us // (2 * count_N)
    p_N = (change_N > 0).astype(np.int64)
    return sorted_stream(
        t_N, y_N, x_N, p_N, sensor=film_MHW.shape[1:], span=(0, (len(film_MHW) - 1) * step_us)
    )


def add_noise(stream: Stream, recording: _Drawn, count: int, *, first_draw: int) -> Stream:
    """Add `count` noise events to a recording, with uniform random times, places and polarities."""
    begin, end = stream.span
    draws = first_draw + np.arange(4 * count).reshape(-1, 4).T
    limits = (end - begin, *stream.sensor, 2)
    t_K, y_K, x_K, p_K = (
        recording.draw(draw_K, limit) for draw_K, limit in zip(draws, limits, strict=True)
    )
    pairs = zip(stream[:4], (begin + t_K, y_K, x_K, p_K), strict=True)
    return sorted_stream(
        *(np.concatenate(pair) for pair in pairs), sensor=stream.sensor, span=stream.span
    )
