"""Rules in turn: real processes that meet before each turn, and a drift that falls on all alike."""

from __future__ import annotations

import pytest

from pipeline.forecast.rounds import in_rounds
from pipeline.forecast.turns import in_turn
from pipeline.recipe import spec
from pipeline.rules.bptt import BPTT
from pipeline.rules.dsr import DSR
from pipeline.rules.sltt import SLTT
from tests.forecast.test_probe import recipe_with

RULES = (spec(BPTT), spec(SLTT), spec(SLTT, k=1))


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_each_rule_has_a_time_in_each_start() -> None:
    found = in_turn(recipe_with(0.5), RULES, workers=2, starts=2)
    assert list(found) == ["BPTT", "SLTT", "SLTT-1"]
    for turns in found.values():
        assert turns.processes == 2
        assert len(turns.forward_s) == len(turns.backward_s) == 2 and min(*turns.forward_s, *turns.backward_s) > 0
        assert turns.compute_s == tuple(a + b for a, b in zip(turns.forward_s, turns.backward_s, strict=True))


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_what_a_process_ended_in_is_a_line() -> None:
    """DSR has neurons of its own, which this network has not."""
    with pytest.raises(ValueError, match=r"^turns: ValueError: DSR: every neuron must be a RateIF or RateLIF.*$"):
        in_turn(recipe_with(0.5), (spec(DSR),), workers=1)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must divide by 3 workers"):
        in_turn(recipe_with(0.5), RULES, workers=3)


def test_each_round_begins_with_another() -> None:
    assert list(map("".join, in_rounds("abc", 4))) == ["abc", "bca", "cab", "abc"]
