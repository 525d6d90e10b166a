"""What a machine's mounts mean for a run: whether a file that appears is seen at once."""

from __future__ import annotations

from pathlib import Path

MOUNTS = Path("/proc/mounts")


def remembers_absence(folder: Path, *, mounts: Path = MOUNTS) -> str | None:
    """The NFS mount of `folder` whose client may say for up to a minute that a file is not there yet; None: nothing of the kind.

    Whoever asks a run to stop or to save puts a file into its folder. A client answers from what it remembers until the folder's
    attributes expire (acdirmax, 60 s by default), unless it is mounted with lookupcache=positive or none (nfs(5)).
    """
    try:
        lines = mounts.read_text().splitlines()
    except OSError:  # no Linux: nothing is known
        return None
    place, found = folder.resolve(), None
    for line in lines:
        _, at, kind, options, *_ = line.split()
        point = Path(at.encode().decode("unicode_escape"))  # a space is written \040
        if place.is_relative_to(point) and (found is None or len(point.parts) >= len(found[0].parts)):
            found = point, kind, options.split(",")
    if found is None or not found[1].startswith("nfs"):
        return None
    point, _, options = found
    return None if {"lookupcache=pos", "lookupcache=positive", "lookupcache=none", "noac"} & set(options) else str(point)
