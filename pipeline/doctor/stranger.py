"""A process that knows of no token knocks at a Ray cluster: whoever is let in there runs code as the cluster's owner."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Literal

from pipeline.launch.ray import refused_token

KNOCK = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False)"
PATIENCE_S = 60.0
"""Ray 2.60 tries for some 20 s where its token is asked for"""


@dataclass(frozen=True, kw_only=True)
class Stranger:
    """What became of it."""

    outcome: Literal["let in", "refused", "unclear"]
    """`refused`: for want of a token; `unclear`: it did not get in, and nobody said that this was why"""
    said: str = ""
    """by whatever was in its way"""


def stranger(address: str, *, patience_s: float = PATIENCE_S) -> Stranger:
    """`address`: of the cluster itself, `host:port` or `ray://...`. `auto` would be looked up where a stranger cannot look."""
    with tempfile.TemporaryDirectory() as home:  # with no token in it
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
        try:
            done = subprocess.run(
                [sys.executable, "-c", KNOCK, address], env=kept | {"HOME": home, "RAY_AUTH_MODE": "disabled"},
                capture_output=True, timeout=patience_s, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            lines, otherwise = _lines(error.stderr), f"no answer within {patience_s:.0f} s"
        else:
            if done.returncode == 0:
                return Stranger(outcome="let in")
            lines = _lines(done.stderr)
            otherwise = lines[-1] if lines else f"it ended with {done.returncode}"
    return Stranger(outcome="refused") if refused_token(lines) else Stranger(outcome="unclear", said=otherwise)


def _lines(stderr: bytes | None) -> list[str]:
    return [line.strip() for line in (stderr or b"").decode(errors="replace").splitlines() if line.strip()]
