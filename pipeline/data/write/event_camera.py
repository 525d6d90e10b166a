"""A simulated event camera: a film of intensities to the events that it would give.

Each pixel remembers a level. Whenever the intensity has moved away from it by `threshold`, the
pixel gives an event, on or off, and the level follows by one threshold. Sums, products and
comparisons alone, so the same events come out on every machine."""

# M instants of a film, N events, H W pixels

import numpy as np
from numpy.typing import NDArray

from pipeline.core.random import below
from pipeline.data.write.recordings import Stream, in_order


def watch(film_MHW: NDArray[np.float64], *, threshold: float, step_us: int) -> Stream:
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


def with_noise(stream: Stream, random_bits: NDArray[np.uint64]) -> Stream:
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
