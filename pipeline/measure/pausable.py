"""What an instrument does where it is not meant to look: at a teacher's work, or an optimizer's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Pausable:
    """A part of an instrument, which notes nothing while `is_paused`."""

    is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is noted."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False
