"""The simulated camera on films of which the events are known."""

from __future__ import annotations

import numpy as np

from pipeline.core.random import bits
from pipeline.data.write.event_camera import watch, with_noise


def test_nothing_moves_nothing_is_seen() -> None:
    assert len(watch(np.ones((5, 3, 4)), threshold=0.1, step_us=10).t_N) == 0


def test_a_ramp_gives_an_event_for_each_threshold_that_it_crosses() -> None:
    film = np.zeros((5, 2, 3))
    film[:, 1, 2] = [
        0.0,
        0.5,
        2.25,
        2.25,
        1.0,
    ]  # thresholds of 0.5: one up, three more (to 2.0), none, two down (to 1.0)
    seen = watch(film, threshold=0.5, step_us=60)
    assert seen.t_N.tolist() == [30, 70, 90, 110, 195, 225]
    assert seen.p_N.tolist() == [1, 1, 1, 1, 0, 0]
    assert set(seen.y_N.tolist()) == {1} and set(seen.x_N.tolist()) == {2}
    assert (seen.sensor, seen.span) == ((2, 3), (0, 240))


def test_a_level_follows_by_whole_thresholds_only() -> None:
    film = np.zeros((4, 1, 1))
    film[:, 0, 0] = [
        0.0,
        0.9,
        1.1,
        0.05,
    ]  # the level stays at 1 until the intensity is one threshold below it
    seen = watch(film, threshold=1.0, step_us=10)
    assert seen.p_N.tolist() == [1]


def test_noise_is_laid_among_the_events_in_order_of_time() -> None:
    film = np.linspace(0, 5, 11)[:, None, None] * np.ones((1, 4, 4))
    seen = watch(film, threshold=0.5, step_us=100)
    noisy = with_noise(seen, bits(0, 0, 0, np.arange(4 * 50)))
    assert len(noisy.t_N) == len(seen.t_N) + 50
    assert (
        np.all(np.diff(noisy.t_N) >= 0)
        and noisy.t_N.max() < 1000
        and {noisy.y_N.max(), noisy.x_N.max()} == {3}
    )
