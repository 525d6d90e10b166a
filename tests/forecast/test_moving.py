"""What a move of the weights takes: what is planted in it shows, once for each move, and nothing
else moves.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import distributed

from pipeline.forecast.bench import Bench
from pipeline.forecast.moving import moving_s
from pipeline.recipe.recipe import Recipe, spec
from pipeline.rules.ottt import OTTT
from pipeline.train.assemble import build_backend
from pipeline.train.backend.deepspeed import DeepSpeed
from pipeline.train.backend.plain import Plain
from pipeline.train.guards.anomaly import Guard
from tests.forecast.test_probe import recipe_with

SLEEP = 0.05


def bench_of(backend: Literal["deepspeed", "plain"], **changes: Any) -> Bench:
    recipe: Recipe = replace(recipe_with(0.5), backend=backend, **changes)
    return Bench(recipe, batch_size=4, source="noise")


def slept(method: Callable[..., Any]) -> Callable[..., Any]:
    def sleeping(*args: Any, **more: Any) -> Any:
        time.sleep(SLEEP)
        return method(*args, **more)

    return sleeping


@pytest.mark.parametrize(("backend", "of"), [("deepspeed", DeepSpeed), ("plain", Plain)])
def test_a_move_is_the_step_of_the_recipes_own_backend(
    backend: Literal["deepspeed", "plain"], of: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    bench = bench_of(backend)
    before = copy.deepcopy(bench.network.state_dict())
    assert 0 < moving_s(bench) < SLEEP
    monkeypatch.setattr(of, "step", slept(of.step))
    assert SLEEP <= moving_s(bench) < 2 * SLEEP
    assert all(
        torch.equal(value, before[name]) for name, value in bench.network.state_dict().items()
    )
    assert (
        not distributed.is_initialized()
        and os.environ["RANK"] == "3"
        and "WORLD_SIZE" not in os.environ
    )


def test_the_weights_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """What moves them is a copy, with gradients: with the recipe's learning rate it would be
    another network at each turn.
    """
    bench, made = bench_of("deepspeed"), list[Any]()
    monkeypatch.setattr(
        "pipeline.forecast.bench.build_backend",
        lambda *about: made.append(build_backend(*about)) or made[0],
    )
    moving_s(bench)
    [backend] = made
    assert all(
        torch.equal(value, bench.network.state_dict()[name])
        for name, value in backend.network.state_dict().items()
    )


def test_a_move_has_the_look_at_the_gradients_in_it_and_what_is_kept_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = bench_of("plain")
    for name in ("verdict", "keep"):
        monkeypatch.setattr(Guard, name, slept(getattr(Guard, name)))
    assert 2 * SLEEP <= moving_s(bench) < 3 * SLEEP


def test_what_an_engine_alone_says_to_itself_is_no_part_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DeepSpeed 0.19.8 reduces over one worker, too; what several say to one another is planned by
    itself.
    """
    bench, reduced = bench_of("deepspeed"), list[int]()

    def reducing(*about: Any, of: Callable[..., Any] = distributed.all_reduce, **more: Any) -> Any:
        reduced.append(1)
        return slept(of)(*about, **more)

    monkeypatch.setattr(distributed, "all_reduce", reducing)
    assert moving_s(bench) < SLEEP
    assert reduced


def test_of_a_rule_that_moves_the_weights_at_every_step_it_is_one_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = bench_of("deepspeed", rule=spec(OTTT, update="step"))
    monkeypatch.setattr(DeepSpeed, "step", slept(DeepSpeed.step))
    assert SLEEP <= moving_s(bench) < 2 * SLEEP


def test_a_batch_that_would_be_skipped_takes_its_time_too() -> None:
    bench = bench_of("plain")
    bench.x_TB.fill_(torch.nan)
    with torch.no_grad():
        next(bench.network.parameters()).fill_(torch.nan)
    assert moving_s(bench) > 0
