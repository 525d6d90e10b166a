"""Secrets in the environment: which variables hold them, and what is said without their values."""

from __future__ import annotations

import os

SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")
"""in the name of a variable that holds one"""
LEAST_SECRET = 4
"""characters: a shorter value would blank out half of what is said"""


def is_secret(name: str) -> bool:
    return any(word in name.upper() for word in SECRET)


def without_secrets(text: str) -> str:
    """A text with the names of variables in the place of their values."""
    forms = {
        form: name
        for name, value in os.environ.items()
        if is_secret(name)
        for form in _forms(value)
    }
    for form in sorted(forms, key=len, reverse=True):  # a value before what is a part of it
        text = text.replace(form, f"${forms[form]}")
    return text


def _forms(value: str) -> set[str]:
    """As it is and in one line; and as Python quotes it where it is refused: http.client as bytes,
    requests as text.
    """
    plain = (value, value.strip(), " ".join(value.split()))
    forms = {*plain, *(quoted(each)[1:-1] for each in plain for quoted in (repr, ascii))}
    return {form for form in forms if len(form) >= LEAST_SECRET}
