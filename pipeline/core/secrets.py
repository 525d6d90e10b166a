"""Secrets in environment variables: how to recognise them, and remove their values from texts."""

import os

SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")  # in a variable's name
MIN_LENGTH = 4  # of a value that is replaced; shorter values occur in ordinary text


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret."""
    return any(word in name.upper() for word in SECRET_WORDS)


def without_secrets(text: str) -> str:
    """Replace the values of secret environment variables in a text with `$NAME`.

    Other forms of a value are also replaced: without the whitespace around it, with single spaces
    between its words, and as http.client (bytes) and requests (text) quote it.
    """
    forms: dict[str, str] = {}
    for name, value in os.environ.items():
        plain = (value, value.strip(), " ".join(value.split())) if is_secret(name) else ()
        quoted = [quote(each)[1:-1] for each in plain for quote in (repr, ascii)]
        forms |= {form: f"${name}" for form in (*plain, *quoted) if len(form) >= MIN_LENGTH}
    for form in sorted(forms, key=len, reverse=True):  # a value before its parts
        text = text.replace(form, forms[form])
    return text
