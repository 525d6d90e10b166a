"""The machines of a run that are about to be taken away, as one rank has heard of them."""

from __future__ import annotations

import time

from pipeline.train.job import Notice

MARGIN_S = 2.0
"""of a last save before a deadline, beside what it is expected to take"""


class Departures:
    """What notices have told so far."""

    def __init__(self) -> None:
        self.machines: frozenset[str] = frozenset()
        self._deadline: float | None = None
        """of a save that is still to come, on the monotonic clock; None: nobody has named one, or
        the save was made
        """

    def is_new(self, notice: Notice | None) -> bool:
        """Whether a notice speaks of a machine that none has spoken of before."""
        return notice is not None and not self.machines.issuperset(notice.machines)

    def add(self, notice: Notice) -> None:
        self.machines |= frozenset(notice.machines)
        if notice.seconds_left is not None:
            deadline = time.monotonic() + notice.seconds_left
            self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)

    def is_last_call(self, *, batch_s: float, write_s: float) -> bool:
        """Whether a save that waits for one more batch may come too late; both may take twice as
        long as they did.
        """
        return (
            self._deadline is not None
            and self._deadline - time.monotonic() < 2 * (batch_s + write_s) + MARGIN_S
        )

    def saved(self) -> None:
        """For the last time."""
        self._deadline = None
