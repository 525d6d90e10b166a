"""Secrets in environment variables: how to recognise them, and remove their values from texts."""

import os

SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")  # in a variable's name
MIN_LENGTH = 4  # of a value that is replaced; shorter values occur in ordinary text


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret."""
    return any(word in name.upper() for word in SECRET_WORDS)


def without_secrets(text: str) -> str:
    """Replace the values of secret environment variables in a text with `$NAME`.

    Other forms of a value are also replaced: without the whitespace around it, and with single
    spaces between its words. Error messages of http.client and requests contain the `repr` of a
    value. This form is replaced too, with and without escapes of non-ASCII characters.
    """
    forms = {
        form: f"${name}"
        for name, value in os.environ.items()
        if is_secret(name)
        for form in _forms(value)
        if len(form) >= MIN_LENGTH
    }
    for form in sorted(forms, key=len, reverse=True):  # a value before its parts
        text = text.replace(form, forms[form])
    return text


def _forms(value: str) -> list[str]:
    plain = (value, value.strip(), " ".join(value.split()))
    return [*plain, *(quote(each)[1:-1] for each in plain for quote in (repr, ascii))]
