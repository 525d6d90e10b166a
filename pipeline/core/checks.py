"""Checks of arguments, each refused in one line: whole numbers (True and 2.0 are none), and choices
among a few values.
"""

from collections.abc import Collection, Mapping, Sequence


def require(holds: object, rule: str) -> None:
    """Refuse what breaks a rule.

    Args:
        holds: whether the rule is kept.
        rule: one line: who, the rule, what was got.

    Raises:
        ValueError: it is not kept.
    """
    if not holds:
        raise ValueError(rule)


def refuse_unless_counts(
    who: str, numbers: Mapping[str, object], *, least: int = 1, up_to: str | None = None
) -> None:
    """Each must be a whole number, or a sequence of one or more, from `least` on.

    `up_to` only names the upper end in the message, such as T, which is not known yet: nothing is
    compared with it here.

    Raises: ValueError, in the name of `who`, that names the first that is not.
    """
    accepted = f">= {least}" if up_to is None else f"in {least}..{up_to}"
    for name, value in numbers.items():
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            what, fits = "whole numbers", are_counts(value, least=least)
        else:
            what, fits = "a whole number", is_count(value, least=least)
        if not fits:
            raise ValueError(f"{who}: {name} must be {what} {accepted}; got {name}={value!r}")


def refuse_unless_one_of(who: str, accepted: Collection[object], **values: object) -> None:
    """Each of `values` must be one of `accepted`.

    Raises: ValueError, in the name of `who`, for the first that is not: "LIF: reset must be
    'subtract' or 'zero'; got reset='x'"."""
    for name, value in values.items():
        if value not in accepted:
            *others, last = map(repr, accepted)
            listed = f"{', '.join(others)} or {last}" if others else last
            raise ValueError(f"{who}: {name} must be {listed}; got {name}={value!r}")


def is_count(value: object, *, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def are_counts(value: object, *, least: int = 1) -> bool:
    """Whether it is a sequence of one whole number or more, none below `least`."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return False
    return len(value) > 0 and all(is_count(each, least=least) for each in value)


def listed_time_steps(who: str, steps: str) -> tuple[int, ...]:
    """`"1,2,4,8"` as numbers, in order, each once.

    Raises: ValueError, in the name of `who`, for anything else.
    """
    try:
        found = tuple(sorted({int(each) for each in steps.split(",")}))
    except ValueError:
        found = ()
    if not are_counts(found):
        raise ValueError(
            f"{who}: --steps must be numbers of time steps, such as 1,2,4,8; got {steps!r}"
        )
    return found
