"""Rules in turn: real processes that meet before each turn, and a drift that falls on all alike."""

from typing import Any

import pytest
import torch

from pipeline.forecast import bench, rule_timing
from pipeline.forecast.bench import interleave
from pipeline.forecast.rule_timing import measure_interleaved
from pipeline.recipe.recipe import spec
from pipeline.rules.bptt import BPTT
from pipeline.rules.dsr import DSR
from pipeline.rules.sltt import SLTT
from pipeline.train.assemble import build_backend
from pipeline.train.backend.base import Backend
from pipeline.train.backend.collectives import group_of_one
from tests.forecast.test_probe import recipe_with

RULES = (spec(BPTT), spec(SLTT), spec(SLTT, k=1))


@pytest.mark.distributed
@pytest.mark.timeout(120)
@pytest.mark.full
def test_each_rule_has_a_time_in_each_start() -> None:
    """Of DeepSpeed's engines, which sum over both processes."""
    found = measure_interleaved(recipe_with(0.5, backend="deepspeed"), RULES, workers=2, starts=2)
    assert list(found) == ["BPTT", "SLTT", "SLTT-1"]
    for each in found.values():
        assert (each.processes, each.backend) == (2, "deepspeed")
        assert len(each.forward_s) == len(each.backward_s) == 2
        assert min(*each.forward_s, *each.backward_s) > 0


def test_every_turn_stands_behind_the_recipes_backend_whose_moves_leave_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Backend] = []

    def noted(*about: Any) -> Backend:
        made.append(build_backend(*about))
        return made[-1]

    monkeypatch.setattr(bench, "build_backend", noted)
    with group_of_one("cpu"):
        rule_timing.rule_seconds(
            torch.device("cpu"), recipe_with(0.5), {"BPTT": spec(BPTT), "SLTT": spec(SLTT)}, 4, 1
        )
    assert len(made) == 4  # two rounds of two rules
    assert {group["lr"] for backend in made for group in backend.optimizer.param_groups} == {0.0}


def test_a_global_batch_accumulates_its_micro_batches() -> None:
    each = bench.Bench(recipe_with(0.5), batch_size=4)
    with each.training(spec(SLTT), accumulation=3) as (_, meters, train_once):
        train_once()
    assert meters.totals.batches == 1
    assert meters.totals.backward_calls == 3 * each.time_steps
    with group_of_one("cpu"):
        parts = each.seconds(spec(SLTT), batches=1, accumulation=3)
    assert min(parts["forward"], parts["backward"], parts["optimizer"]) > 0


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_what_a_process_ended_in_is_a_line() -> None:
    """DSR has neurons of its own, which this network has not."""
    said = r"^interleaved: DSR: every neuron must be a RateIF or RateLIF.*$"
    with pytest.raises(ValueError, match=said):
        measure_interleaved(recipe_with(0.5), (spec(DSR),), workers=1)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be divisible by 3 workers"):
        measure_interleaved(recipe_with(0.5), RULES, workers=3)


def test_each_round_begins_with_another() -> None:
    assert "".join(interleave("abc", 4)) == "abcbcacababc"
