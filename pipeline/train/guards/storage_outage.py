"""Storage that is away for a while: all ranks wait for it together."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from pipeline.core.files import is_for_the_user
from pipeline.train.backend.collectives import Ranks

T_ = TypeVar("T_")

PATIENCE_S = 600.0  # for storage that fails: the restart of a file server takes minutes
# pause between two tries; each pause is twice as long as the previous one
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
BEAT_S = 1.0


def retry_while_away(
    ranks: Ranks,
    act: Callable[[], T_],
    *,
    beat: Callable[[], None] = lambda: None,
    on_wait: Callable[[str], None] = lambda error: None,
) -> T_:
    """`Ranks.broadcast_object(act)`, tried again while storage fails with an error that may pass.
    Collective.

    While waiting, every rank calls `beat` repeatedly. Rank 0 calls `on_wait` once with the error.

    Raises:
        OSError: the storage failed for ten minutes, or only the user can change the cause. Only
            rank 0 raises it; the others wait for rank 0.
        UserError: see `Ranks.broadcast_object`.
    """
    begun, pause_s, is_reported = time.monotonic(), FIRST_PAUSE_S, False

    def attempt() -> tuple[Any, str | None]:
        try:
            return act(), None
        except OSError as error:
            if not may_be_temporary(error) or time.monotonic() - begun > PATIENCE_S:
                raise
            return None, str(error)

    while True:
        result, failure = ranks.broadcast_object(attempt)
        if failure is None:
            return result
        if ranks.rank == 0 and not is_reported:
            is_reported = True
            with suppress(OSError):  # the journal may lie on the same storage
                on_wait(failure)
        _pause(pause_s, beat)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _pause(seconds: float, beat: Callable[[], None]) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        beat()
        time.sleep(min(left, BEAT_S))


def may_be_temporary(error: OSError) -> bool:
    """Whether the error may go away by itself: not if a file is missing or access is denied."""
    return not isinstance(error, FileNotFoundError) and not is_for_the_user(error)
