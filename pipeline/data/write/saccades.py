"""Saccades over still images: an event camera that looks at a picture and moves its gaze three
times, as for N-MNIST.

The picture stands in the middle of the sensor, and the gaze goes round a triangle, each side in 100
ms. The class can be told from counts summed over time as well: this set asks no network to use
time, it gives real images to networks for events.

Source: Orchard et al. 2015, doi:10.3389/fnins.2015.00437 (the way of recording; path, speed and
camera here are ours)."""

# M instants of a film, N events, H W pixels of the sensor, h w of the picture

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.core.random import below, bits
from pipeline.data.errors import DataError
from pipeline.data.write.event_camera import watch, with_noise
from pipeline.data.write.recordings import Stream

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
        stream = watch(self._film(), threshold=SACCADE_THRESHOLD, step_us=SACCADE_US // SACCADE_INSTANTS)
        noise = 50 + int(below(bits(self.content_seed, self.part, self.number, _SACCADE_NOISE_COUNT), 51))
        return with_noise(
            stream, bits(self.content_seed, self.part, self.number, _SACCADE_NOISE + np.arange(4 * noise))
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
