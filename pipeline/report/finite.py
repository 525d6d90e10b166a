"""What JSON has no place for: NaN and infinities."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any


def finite(value: Any) -> Any:
    """As JSON has it, with null in their place; what is no JSON value stays as it is."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def not_finite(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """`inference.energy_j` and `nan`, of each number within an object that JSON does not have."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from not_finite(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from not_finite(item, f"{name}[{place}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield name, str(value)
