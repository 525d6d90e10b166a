"""Down to the disk: what a file system promises about names and content only once asked, and whose business its errors are."""

from __future__ import annotations

import errno
import os
from pathlib import Path

FOR_THE_USER = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR)
"""what a user has to change; anything else may be gone when the workers are started again"""


def sync_file(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Makes a new file's name survive a power cut, not only its content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
