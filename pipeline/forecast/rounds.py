"""Rules that take turns on a bench, round by round: where a machine gets slower in between, it does
so for all.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from pipeline.forecast.bench import Bench, Cost
from pipeline.recipe.recipe import Spec

T_ = TypeVar("T_")

ROUNDS = 3
"""of what is compared by its seconds"""


def in_rounds(those: Iterable[T_], rounds: int) -> Iterator[list[T_]]:
    """The order of each round: every one begins with another, so that what drifts falls on all
    alike.
    """
    order = list(those)
    for each in range(rounds):
        first = each % len(order)
        yield [*order[first:], *order[:first]]


def costs(bench: Bench, rules: Mapping[str, Spec]) -> tuple[dict[str, list[Cost]], dict[str, str]]:
    """What each rule costs in every round, and why others cannot train the network or do not fit
    into memory.
    """
    rounds: dict[str, list[Cost]] = {label: [] for label in rules}
    refused: dict[str, str] = {}
    for order in in_rounds(rules, ROUNDS):
        for label in order:
            if label in refused:
                continue
            try:
                rounds[label].append(bench.cost(rules[label]))
            except ValueError as error:
                refused[label] = str(error)
                del rounds[label]
    return rounds, refused


def in_the_median(of_one: Sequence[Cost]) -> Cost:
    """Of one rule: in each round it counts the same bytes and operations."""
    seconds = {
        name: statistics.median(getattr(cost, name) for cost in of_one)
        for name in ("forward_s", "backward_s", "loop_s")
    }
    return replace(of_one[0], **seconds)
