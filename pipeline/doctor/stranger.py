"""A process that knows of no token knocks at a Ray cluster: whoever is let in there runs code as the cluster's owner."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import IO, Literal

from pipeline.door import refused_token

KNOCK = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False)"
PATIENCE_S = 60.0
"""for an answer, of whatever kind"""


@dataclass(frozen=True, kw_only=True)
class Stranger:
    """What became of it."""

    outcome: Literal["let in", "refused", "unclear"]
    """`refused`: for want of a token; `unclear`: it did not get in, and nobody said that this was why"""
    said: str = ""
    """by whatever was in its way"""


def stranger(address: str, *, patience_s: float = PATIENCE_S) -> Stranger:
    """`address`: of the cluster itself, `host:port` or `ray://...`. `auto` would be looked up where a stranger cannot look."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryFile() as stderr:  # a home with no token in it
        knocking = subprocess.Popen(
            [sys.executable, "-c", KNOCK, address], env=kept | {"HOME": home, "RAY_AUTH_MODE": "disabled"},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + patience_s
            while knocking.poll() is None and time.monotonic() < deadline:
                if refused_token(_lines(stderr)):  # it would try for a minute
                    return Stranger(outcome="refused")
                time.sleep(0.2)
            ended, lines = knocking.poll(), _lines(stderr)
        finally:
            knocking.kill()
            knocking.wait()
    if ended == 0:
        return Stranger(outcome="let in")
    if refused_token(lines):
        return Stranger(outcome="refused")
    otherwise = f"no answer within {patience_s:.0f} s" if ended is None else f"it ended with {ended}"
    return Stranger(outcome="unclear", said=lines[-1] if ended is not None and lines else otherwise)


def _lines(stderr: IO[bytes]) -> list[str]:
    said = os.pread(stderr.fileno(), 1 << 20, 0)  # no seek: it writes where the file stands, which is the same for both
    return [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
