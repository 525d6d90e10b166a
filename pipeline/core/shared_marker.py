"""A uniquely named file. A process that can read it shares the folder."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Marker:
    """The name and the content of the file, to be sent to other processes."""

    name: str
    content: str

    def is_in(self, folder: Path) -> bool:
        try:
            return (folder / self.name).read_text() == self.content
        except (OSError, ValueError):
            return False


@contextmanager
def placed_marker(folder: Path, *, prefix: str) -> Iterator[Marker]:
    """Write a marker into `folder`, and remove it at the end. Its name begins with `prefix`."""
    marker = Marker(f"{prefix}{secrets.token_hex(8)}", secrets.token_hex(16))
    try:
        (folder / marker.name).write_text(marker.content)
        yield marker
    finally:
        (folder / marker.name).unlink(missing_ok=True)
