"""A run that goes on by what MLflow says, and that nobody hears of: a driver that was killed cannot
say so.
"""

from __future__ import annotations

import time

SILENT_S = 900.0
"""A driver tells MLflow of its machine every 10 s; where that is switched off it is heard at each
point of the curve, evaluation and save, of which the slowest takes minutes."""


def state_told(state: str, heard: float | None) -> str:
    """`running, no word for 25 min`; `heard` is its last sign of life, in unix seconds, None where
    the state is known.
    """
    if heard is None or not is_silent(state, heard):
        return state
    minutes = int((time.time() - heard) // 60)
    return f"{state}, no word for {f'{minutes} min' if minutes < 120 else f'{minutes // 60} h'}"


def is_silent(state: str, heard: float) -> bool:
    return state == "running" and time.time() - heard >= SILENT_S
