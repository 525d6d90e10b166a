"""Whether the folder in which the ranks write a checkpoint is one and the same for all of them.

Rank 0 waits there for what the others have written. On another disk it would wait without an end, its watchdog fed.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pipeline.disk import FOR_THE_USER
from pipeline.marker import Marker, marked
from pipeline.refused import Refused

MARKER = ".shared-"
LOOKS, LOOK_S = 60, 1.0
"""NFS may answer from a cache for as long as acdirmax says, 60 s where nobody has set it (Linux 6, nfs(5))"""


def check_shared(folder: Path, *, rank: int, each: Callable[[Any], list[Any]], beat: Callable[[], None] = lambda: None) -> None:
    """Rank 0 puts a marker into `folder`, and every rank looks for it; collective. `each` and `beat` as `Checkpoints` has them.

    Raises:
        Refused: a rank does not see it, or rank 0 may not write there.
        OSError: rank 0 cannot write there now, on every rank.
    """
    with ExitStack() as ends:
        marker, number, said = each(_put(folder, ends) if rank == 0 else None)[0]
        if marker is None:
            told = f"checkpoints: worker 0 must be able to write to {folder}; got {said}"
            raise Refused(told) if number in FOR_THE_USER else OSError(number, told)
        seen: list[bool] = []
        for look in range(LOOKS):
            seen = each(marker.is_in(folder))
            if all(seen):
                return
            beat()
            time.sleep(LOOK_S if look + 1 < LOOKS else 0)
        hosts = each(socket.gethostname())
    blind = ", ".join(f"{number} on {hosts[number]}" for number, sees in enumerate(seen) if not sees)
    raise Refused(
        f"checkpoints: all workers must see {folder} as worker 0 on {hosts[0]} does; worker {blind} does not: "
        "name storage that the nodes share with --checkpoints, or --runs"
    )


def _put(folder: Path, ends: ExitStack) -> tuple[Marker | None, int, str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return ends.enter_context(marked(folder, prefix=MARKER)), 0, ""
    except OSError as error:
        return None, error.errno or errno.EIO, f"{error.strerror or error}"
