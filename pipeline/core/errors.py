"""What ends a run that cannot go on as asked: one line for the user, and no use in trying again.

`DataError` and `LoaderError` stand here so that processes that write data need not import torch.
"""

from __future__ import annotations

from typing import Any


class UserError(ValueError):
    """Something that the user has to change. Every rank raises it."""


class Diverged(UserError):
    """Training has left all bounds: a loss, a gradient or weights that are not finite.

    A failure where somebody wants the network; an answer where a trial asks how a learning rate
    does.
    """


def remedy(lr: Any, clip_norm: Any) -> str:
    """What to change in a recipe whose training diverged, by its `optimizer.lr` and `clip_norm`,
    where they are known.
    """
    rate = (
        f"lower optimizer.lr ({lr:g})" if isinstance(lr, int | float) else "lower the learning rate"
    )
    return (
        f"{rate} or clip_norm ({clip_norm:g})"
        if isinstance(clip_norm, int | float) and clip_norm
        else f"{rate} or set clip_norm=1.0"
    )


def refusal_of(error: ValueError) -> UserError:
    """What the run ends with once every rank knows of the error."""
    return error if isinstance(error, UserError) else UserError(str(error))


class DataError(ValueError):
    """Data, or a size requested of it, that cannot be used. A retry does not help."""


class LoaderError(RuntimeError):
    """A loader or writer that failed or hung for a reason of the machine. A retry may help."""
