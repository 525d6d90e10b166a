"""The project's errors. Each message is one line for the user.

A restart does not help against a `UserError` or a `DataError`; it may help against a `LoaderError`.
`DataError` and `LoaderError` are here so that processes that write data need not import torch.
"""

from typing import Any


class UserError(ValueError):
    """An error that the user has to resolve. Every rank raises it."""


class Diverged(UserError):
    """A loss, a gradient or weights are not finite.

    The run ends in the state `diverged`. For a trial of a search this is a result, not a failure.
    """


def remedy(lr: Any, clip_norm: Any) -> str:
    """The advice for a training that diverged. The advice names the values that are numbers."""
    rate = f"optimizer.lr ({lr:g})" if isinstance(lr, int | float) else "the learning rate"
    clipping = "set clip_norm=1.0"
    if isinstance(clip_norm, int | float) and clip_norm:
        clipping = f"clip_norm ({clip_norm:g})"
    return f"lower {rate} or {clipping}"


def as_user_error(error: ValueError) -> UserError:
    """The error as a `UserError`, which every rank raises."""
    return error if isinstance(error, UserError) else UserError(str(error))


class DataError(ValueError):
    """Unusable data, or an invalid argument of a data set. A retry does not help."""


def require_data(condition: object, message: str) -> None:
    """As `core.checks.require`, but raise DataError if the condition is false."""
    if not condition:
        raise DataError(message)


class LoaderError(RuntimeError):
    """A loader or writer failed or hung because of the machine. A retry may help."""
