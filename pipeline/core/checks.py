"""Checks of arguments: whole numbers (True and 2.0 are none), and choices among a few values.

An error message has one line.
"""

from collections.abc import Collection, Mapping, Sequence


def require(holds: object, rule: str) -> None:
    """Raise an error if a rule is broken.

    Args:
        holds: whether the rule is kept.
        rule: the message in one line: who, the rule, and the value that was got.

    Raises:
        ValueError: the rule is broken.
    """
    if not holds:
        raise ValueError(rule)


def refuse_unless_counts(
    who: str, numbers: Mapping[str, object], *, least: int = 1, up_to: str | None = None
) -> None:
    """Check that each value is a whole number of at least `least`, or a non-empty list of them.

    Args:
        who: the beginning of the message, such as the name of a class.
        numbers: argument names and values.
        up_to: the upper limit as text for the message, such as T. Values are not compared with it.

    Raises:
        ValueError: names the first value that does not fit.
    """
    accepted = f">= {least}" if up_to is None else f"in {least}..{up_to}"
    for name, value in numbers.items():
        is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        what, fits = ("whole numbers", are_counts) if is_list else ("a whole number", is_count)
        if not fits(value, least=least):
            raise ValueError(f"{who}: {name} must be {what} {accepted}; got {name}={value!r}")


def refuse_unless_one_of(who: str, accepted: Collection[object], **values: object) -> None:
    """Check that each value is one of `accepted`.

    Raises:
        ValueError: names the first value that is not: "LIF: reset must be 'subtract' or 'zero'; got
            reset='x'".
    """
    for name, value in values.items():
        if value not in accepted:
            *others, last = map(repr, accepted)
            listed = f"{', '.join(others)} or {last}" if others else last
            raise ValueError(f"{who}: {name} must be {listed}; got {name}={value!r}")


def is_count(value: object, *, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def are_counts(value: object, *, least: int = 1) -> bool:
    """Whether `value` is a non-empty sequence of whole numbers of at least `least`."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and len(value) > 0
        and all(is_count(each, least=least) for each in value)
    )


def parse_time_steps(who: str, steps: str) -> tuple[int, ...]:
    """Parse `"1,2,4,8"` into numbers, sorted and without repetition.

    Raises:
        ValueError: any other text.
    """
    numbers = [each.strip() for each in steps.split(",")]
    require(
        all(each.isdecimal() and int(each) for each in numbers),
        f"{who}: --steps must be numbers of time steps, such as 1,2,4,8; got {steps!r}",
    )
    return tuple(sorted(set(map(int, numbers))))
