"""The version of spiketrain's code that a process runs: a digest of its files, and the commit; and
the versions of its libraries.

The package's version number is the same for every checkout between two releases.
"""

import functools
import hashlib
import os
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError

NOT_INSTALLED = "not installed"


def installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED


@functools.cache
def code_digest() -> str:
    """A hash (12 hex digits) of this package's Python files and their names at the first call."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        if file.name.startswith(".") or not file.is_file():  # an editor's lock is a broken link
            continue
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root)} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:12]


def check_same_code(
    host: str, digest: str, *, gather: Callable[[Any], list[Any]], of: str = "the code"
) -> None:
    """Check that all ranks run the code of rank 0. Collective.

    A rank with other code, such as another rule or augmentation, would train without an error. The
    replicas would stay equal, but the result would belong to neither version.

    Args:
        host: the name of this rank's machine.
        digest: the digest of this rank's code.
        gather: gathers one value from every rank, in order.
        of: the name of the code in the message.

    Raises:
        UserError: a rank runs other code.
    """
    versions = gather((digest, host))
    first_digest, first_host = versions[0]
    if others := [
        f"{rank} on {host} {digest}"
        for rank, (digest, host) in enumerate(versions)
        if digest != first_digest
    ]:
        raise UserError(
            f"worker: all workers must run {of} of worker 0 on {first_host}, {first_digest}; got"
            f" worker {', '.join(others)}: install the same version on all nodes"
        )


def commit() -> str:
    """The commit of the running code, followed by `+` if tracked files have changes.

    If git fails, for example outside a checkout: the value of SPIKETRAIN_COMMIT, or `unknown`.
    """
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"],
            cwd=Path(__file__).resolve().parent.parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("SPIKETRAIN_COMMIT", "unknown")
