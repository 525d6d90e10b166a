"""The token of a Ray cluster: draw a token for our own cluster, show the user's token to another
cluster, and explain why a cluster did not accept this process.
"""

import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

TOKEN_ADVICE = "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the file that has it"


def draw_token() -> None:
    """Draw a token for our own cluster, unless the user has named one.

    The token stays in the environment of our processes, which no other user can read. Ray 2.60
    would write its own token to ~/.ray/auth_token.
    """
    if not _is_in_environment():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def offer_token() -> None:
    """Let this driver show its token. A driver of Ray 2.60 shows it only in this mode."""
    if _is_in_environment() or Path("~/.ray/auth_token").expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _is_in_environment() -> bool:
    return any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))


def refuse_silent_address(address: str) -> None:
    """Raises: OSError within seconds if nothing listens at the address. Ray 2.60 would try for
    minutes.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


@contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Capture what Ray's C++ code writes to stderr, which is one line for each attempt to join.

    The list has the lines after the `with` block. They are also printed if no exception was raised.
    """
    lines: list[str] = []
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
    for line in lines:
        print(line, file=sys.stderr)


def reason(error: Exception, stderr: Sequence[str]) -> str:
    """The reason why the cluster could not be joined, in one line.

    Ray 2.60 raises "no cluster found" also if a cluster refused the token.
    """
    if any("InvalidAuthToken" in line for line in stderr):  # of Ray's C++ code
        shown = "shows another" if os.environ.get("RAY_AUTH_MODE") == "token" else "shows none"
        return f"it wants its token and this client {shown}; {TOKEN_ADVICE}"
    return f"{str(error).splitlines()[0]}; is it running?"
