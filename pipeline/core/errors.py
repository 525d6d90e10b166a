"""Errors that end a run and remain after a restart. Each message is one line for the user.

Messages of other programs may quote a secret, which `without_secrets` removes.
`DataError` and `LoaderError` are here so that processes that write data need not import torch.
"""

import os
from typing import Any


class UserError(ValueError):
    """An error that the user has to resolve. Every rank raises it."""


class Diverged(UserError):
    """A loss, a gradient or weights are not finite.

    A run has then failed. A trial of a search has a result: its learning rate is too high.
    """


def remedy(lr: Any, clip_norm: Any) -> str:
    """The advice for a recipe whose training diverged.

    It uses the recipe's `optimizer.lr` and `clip_norm` if they are known.
    """
    rate = f"optimizer.lr ({lr:g})" if isinstance(lr, int | float) else "the learning rate"
    is_clipped = isinstance(clip_norm, int | float) and clip_norm
    return f"lower {rate} or {f'clip_norm ({clip_norm:g})' if is_clipped else 'set clip_norm=1.0'}"


def as_user_error(error: ValueError) -> UserError:
    """The error as a `UserError`, which every rank raises."""
    return error if isinstance(error, UserError) else UserError(str(error))


class DataError(ValueError):
    """Unusable data, or an invalid size that was requested of data. A retry does not help."""


def require_data(holds: object, rule: str) -> None:
    """As `core.checks.require`, but raise DataError if the rule is broken."""
    if not holds:
        raise DataError(rule)


class LoaderError(RuntimeError):
    """A loader or writer failed or hung because of the machine. A retry may help."""


SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")  # in the name of a variable
LEAST_SECRET = 4  # the minimum length of a replaced value; shorter ones occur in ordinary text


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret."""
    return any(word in name.upper() for word in SECRET)


def without_secrets(text: str) -> str:
    """Replace the values of secret environment variables in a text with `$NAME`.

    A value may be unchanged, on one line, or quoted: http.client quotes bytes, requests text.
    """
    forms: dict[str, str] = {}
    for name, value in os.environ.items():
        plain = (value, value.strip(), " ".join(value.split())) if is_secret(name) else ()
        quoted = [quote(each)[1:-1] for each in plain for quote in (repr, ascii)]
        forms |= {form: f"${name}" for form in (*plain, *quoted) if len(form) >= LEAST_SECRET}
    for form in sorted(forms, key=len, reverse=True):  # a value before its parts
        text = text.replace(form, forms[form])
    return text
