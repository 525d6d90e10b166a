"""The contrasts of a design of factors with two levels each: main effects, interactions, and effects within a level.

With s = +1 where a factor is at its second level and -1 at its first, the effect of m of the k factors weighs a cell by

    w = s_1 ... s_m / 2^(k - m)

    m = 1  main effect: second level minus first, the mean over the cells of the others
    m = 2  interaction A x B: the effect of A at B's second level minus that at its first, the mean over the others
    m = 3  A x B x C: the interaction A x B at C's second level minus that at its first, the mean over the others

and `at` a level of other factors only their cells there are in it. So an interaction is a difference of differences, in points of
accuracy; software that codes factors -1/+1 and fits a line gives 1/2^m of these.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

Levels = tuple[str, str]
Weights = dict[tuple[str, ...], float]
"""of cells, named by the level of each factor in the order of the design"""


def effect(factors: Mapping[str, Levels], *of: str, at: Mapping[str, str] | None = None) -> Weights:
    """The weights of the effect of one factor, or the interaction of several, `at` levels of others (None: over all of them).

    Raises: ValueError for a factor or a level that the design does not have.
    """
    at = at or {}
    _check(factors, of, at)
    cells = [cell for cell in itertools.product(*factors.values()) if _is_at(factors, cell, at)]
    averaged = 2 ** (len(factors) - len(of) - len(at))
    return {cell: math.prod(_sign(factors, cell, name) for name in of) / averaged for cell in cells}


def all_effects(factors: Mapping[str, Levels], *, most: int = 3) -> dict[str, Weights]:
    """Main effects, then the interactions of two to `most` factors, by name: `weights (1-bit - fp)`, `weights x teacher`."""
    _check_levels(factors)
    return {
        _name(factors, of): effect(factors, *of)
        for count in range(1, min(most, len(factors)) + 1)
        for of in itertools.combinations(factors, count)
    }


def _name(factors: Mapping[str, Levels], of: tuple[str, ...]) -> str:
    if len(of) == 1:
        first, second = factors[of[0]]
        return f"{of[0]} ({second} - {first})"
    return " x ".join(of)


def _sign(factors: Mapping[str, Levels], cell: tuple[str, ...], name: str) -> int:
    return 1 if cell[list(factors).index(name)] == factors[name][1] else -1


def _is_at(factors: Mapping[str, Levels], cell: tuple[str, ...], at: Mapping[str, str]) -> bool:
    return all(at.get(name, level) == level for name, level in zip(factors, cell, strict=True))


def _check_levels(factors: Mapping[str, Levels]) -> None:
    for name, levels in factors.items():
        if len(levels) != 2 or levels[0] == levels[1]:
            raise ValueError(f"effect: a factor must have two levels; got {name}={levels}")


def _check(factors: Mapping[str, Levels], of: tuple[str, ...], at: Mapping[str, str]) -> None:
    _check_levels(factors)
    if not of or len({*of, *at}) < len(of) + len(at) or not {*of, *at} <= factors.keys():
        raise ValueError(f"effect: must name factors of {', '.join(factors)}, each once; got {', '.join((*of, *at)) or 'none'}")
    for name, level in at.items():
        if level not in factors[name]:
            raise ValueError(f"effect: {name} must be {' or '.join(factors[name])}; got {level}")
