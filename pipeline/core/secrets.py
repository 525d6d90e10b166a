"""Secrets in environment variables: how to recognise them, and remove their values from texts."""

import os

SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")  # in the name of a variable
LEAST_SECRET = 4  # the minimum length of a replaced value; shorter ones occur in ordinary text


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret."""
    return any(word in name.upper() for word in SECRET)


def without_secrets(text: str) -> str:
    """Replace the values of secret environment variables in a text with `$NAME`.

    A value is also found without its line ends, and as http.client (bytes) and requests (text)
    quote it.
    """
    forms: dict[str, str] = {}
    for name, value in os.environ.items():
        plain = (value, value.strip(), " ".join(value.split())) if is_secret(name) else ()
        quoted = [quote(each)[1:-1] for each in plain for quote in (repr, ascii)]
        forms |= {form: f"${name}" for form in (*plain, *quoted) if len(form) >= LEAST_SECRET}
    for form in sorted(forms, key=len, reverse=True):  # a value before its parts
        text = text.replace(form, forms[form])
    return text
