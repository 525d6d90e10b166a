"""What could not be found out, as text: what an examination meets is told, whatever it is, and the examination goes on."""

from __future__ import annotations


def failed(error: Exception) -> str:
    """One line that begins with `failed`."""
    return f"failed: {named(error)}"


def named(error: Exception) -> str:
    """The error in one line, its kind first."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
