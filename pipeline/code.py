"""Which of our code a process runs: told apart by its content, as a version stands for every checkout between two releases."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.refused import Refused


@functools.cache
def code_digest() -> str:
    """12 hex digits of this package's files of Python, by name and content, when it was first asked for."""
    root, digest = Path(__file__).resolve().parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        if file.name.startswith(".") or not file.is_file():  # an editor's lock is a link to nowhere
            continue
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root)} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:12]


def check_same_code(host: str, *, each: Callable[[Any], list[Any]]) -> None:
    """Whether all ranks run the code of rank 0; collective, `each` as `Checkpoints` has it.

    A rank with another rule or augmentation would train along: the replicas stay equal, and the numbers are nobody's.

    Raises:
        Refused: one of them does not.
    """
    found = each((code_digest(), host))
    first, at = found[0]
    others = [f"{rank} on {host} {digest}" for rank, (digest, host) in enumerate(found) if digest != first]
    if others:
        raise Refused(f"worker: all must run the code of worker 0 on {at}, {first}; got worker {', '.join(others)}: install one")
