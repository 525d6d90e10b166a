"""Checks of arguments: whole numbers, and choices among a few values.

True and 2.0 do not count as whole numbers. An error message has one line.
"""

from collections.abc import Collection, Mapping, Sequence


def require(condition: object, message: str) -> None:
    """Raise an error if a condition is false.

    Args:
        message: one line with the subject, the rule, and the value that was got.

    Raises:
        ValueError: the condition is false.
    """
    if not condition:
        raise ValueError(message)


def refuse_unless_counts(
    subject: str, numbers: Mapping[str, object], *, minimum: int = 1, up_to: str | None = None
) -> None:
    """Check that each value is a whole number of at least `minimum`, or a non-empty list of them.

    Args:
        subject: the beginning of the message, such as the name of a class.
        numbers: argument names and values.
        up_to: the upper limit as text for the message, such as T. Values are not compared with it.

    Raises:
        ValueError: a value does not fit. The message names the first such value.
    """
    accepted = f">= {minimum}" if up_to is None else f"in {minimum}..{up_to}"
    for name, value in numbers.items():
        is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        kind = "whole numbers" if is_list else "a whole number"
        fits = are_counts if is_list else is_count
        if not fits(value, minimum=minimum):
            raise ValueError(f"{subject}: {name} must be {kind} {accepted}; got {name}={value!r}")


def refuse_unless_one_of(subject: str, accepted: Collection[object], **values: object) -> None:
    """Check that each value is one of `accepted`.

    Raises:
        ValueError: a value is none of them. The message names the first such value: "LIF: reset
            must be 'subtract' or 'zero'; got reset='x'".
    """
    for name, value in values.items():
        if value not in accepted:
            *others, last = map(repr, accepted)
            choices = f"{', '.join(others)} or {last}" if others else last
            raise ValueError(f"{subject}: {name} must be {choices}; got {name}={value!r}")


def is_count(value: object, *, minimum: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def are_counts(value: object, *, minimum: int = 1) -> bool:
    """Whether `value` is a non-empty sequence of whole numbers of at least `minimum`."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and len(value) > 0
        and all(is_count(each, minimum=minimum) for each in value)
    )


def parse_time_steps(subject: str, steps: str) -> tuple[int, ...]:
    """Parse the value of `--steps`, such as "1,2,4,8", into sorted numbers without repetition.

    Raises:
        ValueError: the text has another form.
    """
    numbers = [each.strip() for each in steps.split(",")]
    require(
        all(each.isdecimal() and int(each) for each in numbers),
        f"{subject}: --steps must be numbers of time steps, such as 1,2,4,8; got {steps!r}",
    )
    return tuple(sorted(set(map(int, numbers))))
