"""Storage that is away for a while: all ranks wait for it together, as a start that fails would be
one of few.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from pipeline.core.files import is_for_the_user
from pipeline.train.backend.collectives import Ranks

T_ = TypeVar("T_")

PATIENCE_S = 600.0
"""for storage that fails: a server of it that is started anew takes minutes"""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""between two tries; each pause is twice the one before"""
BEAT_S = 1.0


def patiently(
    ranks: Ranks,
    act: Callable[[], T_],
    *,
    beat: Callable[[], None] = lambda: None,
    on_wait: Callable[[str], None] = lambda error: None,
) -> T_:
    """Rank 0 acts, as in `Ranks.broadcast_object`, and again and again while storage fails for no
    fault of the user's; collective.

    Meanwhile every rank calls `beat`, again and again; rank 0 tells `on_wait` once what has failed.

    Raises:
        OSError: it failed for ten minutes, or as only the user can change; on rank 0, which the
        others wait for. UserError: see `Ranks.broadcast_object`.
    """
    begun, pause_s, is_told = time.monotonic(), FIRST_PAUSE_S, False
    while True:
        result, failure = ranks.broadcast_object(
            lambda: _tried(act, is_last=time.monotonic() - begun > PATIENCE_S)
        )
        if failure is None:
            return result
        if ranks.rank == 0 and not is_told:
            is_told = True
            with suppress(OSError):  # the journal, which may lie on the same storage
                on_wait(failure)
        _pause(pause_s, beat)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def may_pass(error: OSError) -> bool:
    """Whether it may be gone without anything that the user does: not where something is gone, or
    closed to them.
    """
    return not isinstance(error, FileNotFoundError) and not is_for_the_user(error)


def _tried(act: Callable[[], Any], *, is_last: bool) -> tuple[Any, str | None]:
    """What it gave, or why it has to be tried again."""
    try:
        return act(), None
    except OSError as error:
        if is_last or not may_pass(error):
            raise
        return None, str(error)


def _pause(seconds: float, beat: Callable[[], None]) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        beat()
        time.sleep(min(left, BEAT_S))
