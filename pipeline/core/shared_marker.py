"""A uniquely named file. A process that can read it shares the folder."""

import errno
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError
from pipeline.core.files import FOR_THE_USER

MARKER = ".shared-"
LOOKS, LOOK_S = 60, 1.0  # NFS caches names for 60 s by default (acdirmax; Linux 6, nfs(5))


@dataclass(frozen=True)
class Marker:
    """The name and the content of the file, which are sent to other processes."""

    name: str
    content: str

    def is_in(self, folder: Path) -> bool:
        try:
            return (folder / self.name).read_text() == self.content
        except (OSError, ValueError):
            return False


def check_shared(
    folder: Path,
    *,
    rank: int,
    each: Callable[[Any], list[Any]],
    beat: Callable[[], None] = lambda: None,
) -> None:
    """Check that all ranks see the same folder for checkpoints. Collective.

    Rank 0 creates a marker in it, and every rank looks for the marker. Without this check, rank 0
    would wait forever for the files of a rank that writes to another disk.

    Args:
        each: gathers every rank's value on every rank, in the order of ranks.
        beat: called repeatedly by a waiting rank.

    Raises:
        UserError: a rank does not see the marker, or rank 0 has no permission to write it.
        OSError: rank 0 cannot write now; raised on every rank.
    """
    marker, number, reason = each(_put_marker(folder) if rank == 0 else None)[0]
    try:
        if number:
            message = f"checkpoints: worker 0 must be able to write to {folder}; got {reason}"
            raise UserError(message) if number in FOR_THE_USER else OSError(number, message)
        for _ in range(LOOKS):
            if all(each(marker.is_in(folder))):
                return
            beat()
            time.sleep(LOOK_S)
        seen, hosts = each(marker.is_in(folder)), each(socket.gethostname())
    finally:
        if rank == 0:
            with suppress(OSError):  # a remaining marker is cleaned up later
                (folder / marker.name).unlink()
    blind = ", ".join(f"{at} on {hosts[at]}" for at, sees in enumerate(seen) if not sees)
    raise UserError(
        f"checkpoints: all workers must see {folder} as worker 0 on {hosts[0]} does; worker"
        f" {blind} does not: name storage that the nodes share with --checkpoints, or --runs"
    )


def _put_marker(folder: Path) -> tuple[Marker, int, str]:
    """Write a marker to `folder`; return it with the number and text of the error (0: none)."""
    marker = Marker(f"{MARKER}{secrets.token_hex(8)}", secrets.token_hex(16))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / marker.name).write_text(marker.content)
    except OSError as error:
        return marker, error.errno or errno.EIO, f"{error.strerror or error}"
    return marker, 0, ""
