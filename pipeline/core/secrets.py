"""Secrets in environment variables: how to recognise them, and remove their values from texts."""

import os

SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")
"""words in the name of a variable that holds a secret"""
LEAST_SECRET = 4
"""the minimum length of a replaced value; shorter ones occur in ordinary text"""


def is_secret(name: str) -> bool:
    return any(word in name.upper() for word in SECRET)


def without_secrets(text: str) -> str:
    """Replace the values of secret variables in a text with `$NAME`."""
    forms = {
        form: name
        for name, value in os.environ.items()
        if is_secret(name)
        for form in _forms(value)
    }
    for form in sorted(forms, key=len, reverse=True):  # a value before its parts
        text = text.replace(form, f"${forms[form]}")
    return text


def _forms(value: str) -> set[str]:
    """The forms of a value in texts: unchanged, on one line, and quoted in error messages.

    http.client quotes bytes, and requests quotes text.
    """
    plain = (value, value.strip(), " ".join(value.split()))
    forms = {*plain, *(quoted(each)[1:-1] for each in plain for quoted in (repr, ascii))}
    return {form for form in forms if len(form) >= LEAST_SECRET}
