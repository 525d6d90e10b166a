"""Retries an action while its storage is temporarily unavailable. All ranks wait together."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from pipeline.core.files import is_for_the_user
from pipeline.train.backend.collectives import Ranks

T_ = TypeVar("T_")

OUTAGE_TIMEOUT_S = 600.0  # the restart of a file server takes minutes
# Pauses between two attempts. Each pause is twice as long as the previous one, up to the longest.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
BEAT_S = 1.0  # the longest time between two calls of `beat` in a pause


def retry_during_outage(
    ranks: Ranks,
    function: Callable[[], T_],
    *,
    beat: Callable[[], None] = lambda: None,
    on_wait: Callable[[str], None] = lambda error: None,
) -> T_:
    """Rank 0's result of `function`, on every rank. Rank 0 calls `function` again while it raises
    an OSError that may be temporary. Collective.

    During the pauses, every rank calls `beat` repeatedly. Before the first pause, rank 0 calls
    `on_wait` with the error.

    Raises:
        OSError: the error lasted for ten minutes, or is not temporary. Only rank 0 raises it, and
            the other ranks wait for rank 0.
        UserError: see `Ranks.broadcast_object`.
    """
    deadline, pause_s = time.monotonic() + OUTAGE_TIMEOUT_S, FIRST_PAUSE_S

    def attempt() -> tuple[Any, str | None]:
        try:
            return function(), None
        except OSError as error:
            if not may_be_temporary(error) or time.monotonic() > deadline:
                raise
            return None, str(error)

    while True:
        result, message = ranks.broadcast_object(attempt)
        if message is None:
            return result
        if ranks.rank == 0 and pause_s == FIRST_PAUSE_S:
            with suppress(OSError):  # the journal may be on the same storage
                on_wait(message)
        _pause(pause_s, beat)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _pause(seconds: float, beat: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while (left_s := end - time.monotonic()) > 0:
        beat()
        time.sleep(min(left_s, BEAT_S))


def may_be_temporary(error: OSError) -> bool:
    """Whether the error may end by itself, unlike a missing file or denied access."""
    return not isinstance(error, FileNotFoundError) and not is_for_the_user(error)
