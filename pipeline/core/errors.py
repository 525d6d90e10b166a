"""Errors that end a run and that a restart does not cure: each message is one line for the user.

`DataError` and `LoaderError` stand here so that processes that write data need not import torch.
"""

from typing import Any


class UserError(ValueError):
    """The user has to change something. Every rank raises it."""


class Diverged(UserError):
    """A loss, a gradient or weights are not finite.

    A run has failed then. A trial of a search has a result: its learning rate is too high.
    """


def remedy(lr: Any, clip_norm: Any) -> str:
    """What to change in a recipe whose training diverged, given its `optimizer.lr` and `clip_norm`
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


def as_user_error(error: ValueError) -> UserError:
    """The error as a `UserError`, which every rank raises."""
    return error if isinstance(error, UserError) else UserError(str(error))


class DataError(ValueError):
    """Data, or a size requested of it, that cannot be used. A retry does not help."""


def require_data(holds: object, rule: str) -> None:
    """As `core.checks.require`, for data: raises DataError where the rule is broken."""
    if not holds:
        raise DataError(rule)


class LoaderError(RuntimeError):
    """A loader or writer that failed or hung for a reason of the machine. A retry may help."""
