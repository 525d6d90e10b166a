"""A run that compares its rule's gradient with BPTT's as it goes: what it tells, and that it
changes nothing.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.measure.gradient_similarity import fidelity, gradients
from pipeline.models.convnet import convnet
from pipeline.models.mlp import mlp
from pipeline.models.transforms import synchronized
from pipeline.recipe.recipe import Evaluation, Recipe, Spec, spec
from pipeline.rules.base import World
from pipeline.rules.bptt import BPTT
from pipeline.rules.opzo import OPZO
from pipeline.rules.sltt import SLTT
from pipeline.train import assemble
from pipeline.train.assemble import compare_gradients
from pipeline.train.build import check_recipe
from tests.helpers.small import events, finished, goes_on, same_weights, small_recipe, train_inline


def small(**changes: Any) -> Recipe:
    return small_recipe(
        model=spec(mlp, in_features=64, hidden=(16,)), **{"rule": spec(SLTT), **changes}
    )


def compared() -> Recipe:
    return small(evaluation=Evaluation(fidelity_every=1))


def test_it_is_told_at_the_start_and_after_each_epoch_and_changes_nothing(tmp_path: Path) -> None:
    """A run that died tells the same."""
    train_inline(tmp_path / "plain", small())
    summary, _ = goes_on(tmp_path, compared())
    assert same_weights(tmp_path / "plain", tmp_path / "whole")
    found, again = (events(tmp_path / name, "fidelity") for name in ("whole", "broken"))
    for name in ("step", "temporal_share", "cosines"):
        assert [event[name] for event in found] == [event[name] for event in again]
    assert [(event["step"], event["epoch"]) for event in found] == [(0, None), (8, 0), (16, 1)]
    shares = [list(event["temporal_share"].values()) for event in found]
    assert shares[0] != shares[1] != shares[2]
    assert all(0 <= share < 2 for each in shares for share in each)
    assert all(list(event["cosines"]) == ["SLTT"] for event in found)
    assert summary["fidelity_s"] > 0
    assert compared().study_key({}) == small().study_key({})


def test_bptt_is_near_itself(tmp_path: Path) -> None:
    train_inline(tmp_path / "run", small(rule=spec(BPTT), evaluation=Evaluation(fidelity_every=2)))
    start, end = events(tmp_path / "run", "fidelity")
    assert end["step"] == 16
    assert all(cosine == pytest.approx(1) for cosine in start["cosines"]["BPTT"].values())


def test_what_a_rule_learns_by_itself_is_compared_as_it_trains(tmp_path: Path) -> None:
    """OPZO's matrices are 0 before the first batch, and so is what they hand to hidden layers."""
    train_inline(tmp_path / "run", small(rule=spec(OPZO), evaluation=Evaluation(fidelity_every=2)))
    start, end = (event["cosines"]["OPZO"] for event in events(tmp_path / "run", "fidelity"))
    hidden, *_ = start
    assert start[hidden] == 0 and end[hidden] > 0.05


@pytest.mark.parametrize("rule", [spec(OPZO, feedback="random"), spec(SLTT, k=1)])
def test_what_a_rule_draws_it_draws_with_the_seed_of_the_recipe(rule: Spec) -> None:
    recipe = small(rule=rule, seed=3)
    torch.manual_seed(0)
    network, loss = recipe.model.build(), recipe.objective.build()
    x_TB, target_B = 4 * torch.randn(3, 8, 1, 8, 8), torch.arange(8)

    def cosines(seed: int) -> dict[str, float]:
        bptt, own = (
            gradients(network, each, x_TB, lambda: loss(target_B), world=World(seed))
            for each in (BPTT(), rule.build())
        )
        return fidelity(bptt, None, {"own": [own]}).cosines["own"]

    states = network.state_dict(), rule.build().state_dict()
    found = compare_gradients(recipe, recipe.model.build, loss, x_TB, target_B, *states, step=0)
    assert found.cosines[rule.build().label] == cosines(3) != cosines(0)


def test_a_norm_that_asks_all_workers_is_not_asked_by_the_one_that_compares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`moments_over_ranks` is None here: who calls it fails."""
    normed = spec(convnet, classes=10, in_channels=1, stages=((4,), (4,)))
    recipe = small_recipe(model=spec(synchronized, network=normed), rule=spec(SLTT))
    torch.manual_seed(0)
    weights, loss = recipe.model.build().state_dict(), recipe.objective.build()
    batch = (4 * torch.randn(3, 8, 1, 8, 8), torch.arange(8), weights, {})
    expected = compare_gradients(recipe, normed.build, loss, *batch, step=0)
    monkeypatch.setattr("pipeline.spiking.norm.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("pipeline.spiking.norm.moments_over_ranks", None)
    assert compare_gradients(recipe, recipe.model.build, loss, *batch, step=0) == expected


def test_what_bptt_or_sltt_cannot_train_is_refused_before_anything_is_launched() -> None:
    with pytest.raises(
        ValueError, match=r"recipe: evaluation.fidelity_every compares with BPTT and SLTT; SLTT"
    ):
        check_recipe(replace(compared(), rule=spec(BPTT), over_time="mean"), 1)


def test_what_the_comparison_holds_is_not_what_training_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_ballast(*words: Any, **more: Any) -> Any:
        ballast = bytearray(b"x") * (300 << 20)
        found = compare_gradients(*words, **more)
        assert len(ballast) > 0
        return found

    alone = finished(tmp_path / "alone", small(epochs=1))
    monkeypatch.setattr(assemble, "compare_gradients", with_ballast)
    beside = finished(tmp_path / "beside", replace(compared(), epochs=1))
    assert abs(beside["peak_rss_bytes"] - alone["peak_rss_bytes"]) < 150 << 20
