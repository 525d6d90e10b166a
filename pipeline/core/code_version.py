"""Which of our code a process runs: by its content, as a version stands for every checkout between
two releases; its commit.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError


@functools.cache
def code_digest() -> str:
    """12 hex digits of this package's files of Python, by name and content, when it was first asked
    for.
    """
    root, digest = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        if file.name.startswith(".") or not file.is_file():  # an editor's lock is a link to nowhere
            continue
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root)} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:12]


def check_same_code(
    host: str, digest: str, *, each: Callable[[Any], list[Any]], of: str = "the code"
) -> None:
    """Whether all ranks run the code of rank 0, by its `digest`; collective, `each` as
    `Checkpoints` has it.

    A rank with another rule or augmentation would train along: the replicas stay equal, and the
    numbers are nobody's.

    Raises:
        UserError: one of them does not.
    """
    found = each((digest, host))
    first, at = found[0]
    others = [
        f"{rank} on {host} {digest}" for rank, (digest, host) in enumerate(found) if digest != first
    ]
    if others:
        raise UserError(
            f"worker: all must run {of} of worker 0 on {at}, {first}; got worker"
            f" {', '.join(others)}: install one"
        )


def commit() -> str:
    """The commit of the code that trains, with `+` when the tree has changes; outside a checkout
    what SPIKETRAIN_COMMIT says.
    """
    here = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("SPIKETRAIN_COMMIT", "unknown")
