"""At the door of a Ray cluster: draw a token for our own; at one that is there already show its
token, see that somebody listens, say why nobody let us in.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

TOKEN_ADVICE = "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the file that has it"


def draw_token() -> None:
    """For a cluster of our own, unless the user names one: in the environment, which is its
    processes' and no other user's.

    Ray 2.60 would draw one itself, and write it to ~/.ray/auth_token for every user of the machine
    to read.
    """
    if not _is_in_environment():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def offer_token() -> None:
    """A cluster of Ray 2.60 asks for a token as soon as it has one; a driver shows its own only
    when told to.
    """
    if _is_in_environment() or Path("~/.ray/auth_token").expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _is_in_environment() -> bool:
    return any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))


def refuse_silent_address(address: str) -> None:
    """Fail within seconds where nobody listens: Ray 2.60 tries for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


@contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """What Ray's C++ writes to this process's stderr meanwhile, a line for each of its tries: shown
    only where they led in.
    """
    said: list[str] = []
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said += file.read().decode(errors="replace").splitlines()
    for line in said:
        print(line, file=sys.stderr)


def reason(error: Exception, said: Sequence[str]) -> str:
    """Ray 2.60 raises that nobody is there, also where somebody is and refused its token."""
    if refused_token(said):
        shown = "shows another" if os.environ.get("RAY_AUTH_MODE") == "token" else "shows none"
        return f"it wants its token and this client {shown}; {TOKEN_ADVICE}"
    return f"{str(error).splitlines()[0]}; is it running?"


def refused_token(said: Iterable[str]) -> bool:
    """Whether lines that Ray's C++ wrote to stderr tell of a token that was missing or another
    (2.60).
    """
    return any("InvalidAuthToken" in line for line in said)
