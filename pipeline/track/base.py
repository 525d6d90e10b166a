"""The interface of tracking to the training loop: a tracker takes events."""

from __future__ import annotations

from typing import Any, Protocol


class TrackingError(RuntimeError):
    """A tracking store could not be reached or read; the message is one line for a user."""


class Tracker(Protocol):
    """Takes the events of one run. Rank 0 holds a `Journal`, the others a `NullTracker`."""

    def event(self, kind: str, /, *, sync: bool = False, **fields: Any) -> None:
        """Take one event; with `sync`, return once it would survive a power cut (not for steps)."""
        ...

    def close(self) -> None: ...


class NullTracker:
    """The tracker of ranks other than 0, which ignores events."""

    def event(self, kind: str, /, *, sync: bool = False, **fields: Any) -> None:
        del kind, sync, fields

    def close(self) -> None:
        pass
