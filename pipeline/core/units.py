"""Numbers as text: scaled, with their units."""

import math
from collections.abc import Sequence


def unit_of(kind: str, values: Sequence[float]) -> tuple[float, str]:
    """The scale and the unit that suit the largest of `values`.

    `kind` is "B" (bytes), "s", "J", "count" or "rate".
    """
    largest = max(map(abs, values), default=0.0)
    steps: tuple[tuple[float, str], ...] = {
        "B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
        "s": ((7200.0, "h"), (120.0, "min"), (1.0, "s"), (1e-3, "ms")),
        "J": (
            (1e6, "MJ"),
            (1e3, "kJ"),
            (1.0, "J"),
            (1e-3, "mJ"),
            (1e-6, "µJ"),
            (1e-9, "nJ"),
            (1e-12, "pJ"),
        ),
        "count": ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")),
        "rate": ((1.0, ""),),
    }[kind]
    minimum, unit = next((step for step in steps if largest >= step[0]), steps[-1])
    return {"h": 3600.0, "min": 60.0}.get(unit, minimum), unit


def counted(count: int | None, noun: str) -> str:
    """`1 worker`, `2 workers`, `2 batches`; `? workers` if the number is unknown."""
    if count == 1:
        return f"1 {noun}"
    plural = f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"
    return f"{'?' if count is None else count} {plural}"


def rounded(value: float, *, digits: int = 4) -> str:
    """A number with `digits` significant digits, or all integer digits: `31234` for 31234.2."""
    return f"{value:.0f}" if 10 ** (digits - 1) <= abs(value) < math.inf else f"{value:.{digits}g}"


def format_quantity(value: float, *, kind: str) -> str:
    """A number as text: bytes, seconds or joules with the unit, a count, a rate or a share."""
    if kind == "share":
        return f"{value:.2%}"
    if kind == "rate":
        return rounded(value)
    scale, unit = unit_of(kind, [value])
    return f"{rounded(value / scale, digits=3)} {unit}".rstrip()


def first_few(names: Sequence[str], max_names: int = 5) -> str:
    """The first names, and the number of further ones."""
    more = f" and {len(names) - max_names} more" if len(names) > max_names else ""
    return ", ".join(names[:max_names]) + more
