"""What the control groups of this process leave it of their limits of memory: a container's, a
pod's, a job's of Slurm.

    room = limit - used + page cache that the kernel can give back

A group's limit holds for all inside it, so that the least room of the process's own group and those
above it counts. Where a container sees its own group as the root of the mount, as Docker shows it,
the path of the process's group leads nowhere there, or is "/", and the root is what counts.

Source: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of Linux.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
"""files of the limit and of what is used, and the field of memory.stat that holds the cache, of the
groups inside too
"""


def room_bytes(
    *, mount: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")
) -> int | None:
    """None where no group has a limit, or none can be read. `groups` says which this process is
    in.
    """
    rooms = [
        room
        for folder, files in _folders(mount, groups)
        if (room := _room(folder, *files)) is not None
    ]
    return min(rooms, default=None)


def _folders(mount: Path, groups: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Of each group that may limit memory, from the process's own to the root of the mount."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, files = mount, _V2
        elif "memory" in controllers.split(","):
            root, files = mount / "memory", _V1
        else:
            continue
        own = root / path.lstrip("/")
        yield from (
            (folder, files) for folder in (own, *own.parents) if folder.is_relative_to(root)
        )


def _room(folder: Path, limit: str, used: str, cache: str) -> int | None:
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(
            0,
            int((folder / limit).read_text())
            - int((folder / used).read_text())
            + int(stat.get(cache, 0)),
        )
    except (OSError, ValueError):  # no such group here, or no limit: "max"
        return None
