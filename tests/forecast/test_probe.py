"""What rules cost and drop on one batch, against counts that are known and gradients of known
distance.
"""

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import save_file

from pipeline.forecast.bench import DRAWS, RULES, BatchBench, Bench, Cost, DoesNotFit
from pipeline.forecast.probe import Probe, advice, probe
from pipeline.forecast.sweep import sweep
from pipeline.measure.gradient_similarity import Fidelity, gradients
from pipeline.models.mlp import mlp
from pipeline.recipe.recipe import Recipe, Spec, spec
from pipeline.report.forecasts import print_probe, probe_to_json
from pipeline.rules.bptt import BPTT
from pipeline.rules.hlop import HLOP
from pipeline.rules.opzo import OPZO
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF
from tests.helpers.small import small_recipe
from tests.train.test_teaching import taught

PAIR = (spec(BPTT), spec(SLTT))
FULL = "a batch must fit into memory; 8 samples at T = 4 do not"


def recipe_with(decay: float, **changes: object) -> Recipe:
    """64-16-10 at T = 4, without norms."""
    network = spec(mlp, in_features=64, hidden=(16,), neuron=spec(LIF, decay=decay))
    return small_recipe(model=network, rule=spec(SLTT, k=2), time_steps=4, **changes)


def printed(show: Callable[..., object], found: object) -> list[str]:
    show(found, console=Console(file=(out := io.StringIO()), width=250))
    return out.getvalue().splitlines()


@pytest.fixture(scope="module")
def found() -> Probe:
    return probe(recipe_with(0.5))


def test_a_rule_that_draws_time_steps_is_looked_at_in_several_draws_inside_another_too() -> None:
    bench = Bench(recipe_with(0.5), batch_size=4)
    rules = (spec(SLTT, k=1), spec(HLOP, inner=spec(SLTT, k=1), rows=((3, 2),)), spec(SLTT))
    assert [len(bench.gradients_of(rule)) for rule in rules] == [DRAWS, DRAWS, 1]


def test_opzo_learns_as_long_inside_another_rule_as_alone() -> None:
    rules = (spec(OPZO), spec(HLOP, inner=spec(OPZO), rows=((3, 2),)))
    alone, inside = (Bench(recipe_with(0.5), batch_size=4).gradients_of(rule) for rule in rules)
    torch.testing.assert_close(inside, alone, rtol=0, atol=0)


def test_every_rule_that_fits_is_probed_and_the_others_say_why(found: Probe) -> None:
    assert " ".join(cost.rule for cost in found.costs) == (
        "BPTT BPTT-chunk-1 BPTT-recompute SLTT SLTT-1 OTTT-A OPZO SLTT-2"
    )
    assert set(found.refused) == {"DSR", "IDE", "SPIDE"} and len(RULES) == 10
    assert (found.samples, found.time_steps) == (8, 4)
    assert found.refused["DSR"].startswith("DSR: every neuron must be a RateIF or RateLIF")


def test_costs_are_those_of_the_rules(found: Probe) -> None:
    costs = {cost.rule: cost for cost in found.costs}
    assert costs["SLTT"].peak_saved_bytes < 0.6 * costs["BPTT"].peak_saved_bytes
    assert costs["SLTT-1"].operations["error"]["dense"] == pytest.approx(
        costs["SLTT"].operations["error"]["dense"] / 4
    )
    assert (
        costs["BPTT"].operations["forward"]["dense"] == 64 * 16 + 4 * 16 * 10
    )  # a still image meets its synapse once
    assert costs["BPTT-recompute"].operations["recomputation"]["dense"] == 2 * 64 * 16 + 4 * 16 * 10
    assert set(costs["OPZO"].operations) == {"forward", "weights", "feedback"}
    assert all(cost.forward_s > 0 and cost.backward_s > 0 for cost in found.costs)


def test_what_a_rule_has_of_its_own_is_told_where_one_has(found: Probe) -> None:
    """OPZO's matrix of 16 neurons and 10 outputs, the sum that it learns from, and the count of its
    moves.
    """
    own = {cost.rule: cost.rule_bytes for cost in found.costs}
    assert own == dict.fromkeys(own, 0) | {"OPZO": 2 * 16 * 10 * 4 + 8}
    out = "\n".join(printed(print_probe, found))
    assert "rule's tensors" in out and "0.001288 MB" in out
    assert "rule's tensors" not in "\n".join(
        printed(print_probe, probed(SLTT=(20, 0.9, {"a": 0.95})))
    )


def test_fidelity_is_of_every_synapse(found: Probe) -> None:
    assert found.fidelity is not None
    layers, share = {"layers.0", "classifier"}, found.fidelity.temporal_share
    assert set(share) == layers == set(found.fidelity.cosines["SLTT"])
    assert found.fidelity.cosines["BPTT-recompute"] == dict.fromkeys(layers, pytest.approx(1))
    assert share["classifier"] == pytest.approx(0, abs=1e-6)  # a readout without membrane


def test_without_a_leak_nothing_comes_through_time() -> None:
    forgetful = probe(recipe_with(0.0), rules=PAIR).fidelity
    assert forgetful is not None
    assert forgetful.temporal_share["layers.0"] == pytest.approx(0, abs=1e-6)


def test_a_recipe_that_starts_from_weights_is_probed_with_them(tmp_path: Path) -> None:
    """Of a network that is silent but for its readout, whose bias alone is not 0, no gradient
    reaches the first layer.
    """
    start, ones = tmp_path / "start.safetensors", torch.ones(10)
    shapes = recipe_with(0.5).model.build().state_dict()
    silent = {name: torch.zeros_like(value) for name, value in shapes.items()}
    save_file({**silent, "classifier.bias": ones}, start)
    recipe = recipe_with(0.5, init=str(start))
    found = probe(recipe, rules=PAIR).fidelity
    assert found is not None and math.isnan(found.temporal_share["layers.0"])
    assert torch.equal(Bench(recipe).network.state_dict()["classifier.bias"], ones)


def test_a_taught_recipe_is_probed_with_labels_and_its_teacher_is_told_beside() -> None:
    found = probe(taught(), rules=(spec(BPTT),))
    assert [cost.rule for cost in found.costs] == ["BPTT", "SLTT-1"]
    teacher, network = found.teacher, timm.create_model("test_efficientnet")
    assert teacher is not None and teacher.teacher == "test_efficientnet" and teacher.seconds > 0
    assert teacher.bytes > 4 * sum(each.numel() for each in network.parameters())
    said = "no row includes the teacher, test_efficientnet: it holds"
    assert any(line.startswith(said) for line in printed(print_probe, found))
    assert probe_to_json(found)["teacher"]["bytes"] == teacher.bytes


def test_rules_take_turns_and_the_median_of_the_rounds_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a machine that gets slower with every look."""
    monkeypatch.setattr("pipeline.forecast.bench.ROUNDS", 3)
    turns: list[str] = []
    cost = Bench.cost

    def slower(self: Bench, rule: Spec) -> Cost:
        found = cost(self, rule)
        turns.append(found.rule)
        return replace(found, forward_s=float(len(turns)), backward_s=0.0)

    monkeypatch.setattr(Bench, "cost", slower)
    found = probe(recipe_with(0.5), rules=PAIR)
    assert turns == ["BPTT", "SLTT", "SLTT-2", "SLTT", "SLTT-2", "BPTT", "SLTT-2", "BPTT", "SLTT"]
    assert found.rounds == {"BPTT": (1, 6, 8), "SLTT": (2, 4, 9), "SLTT-2": (3, 5, 7)}
    assert [each.forward_s for each in found.costs] == [6, 4, 5]
    turns.clear()
    points = sweep(recipe_with(0.5), steps=(2,), rules=PAIR).points
    assert [point.cost.forward_s for point in points] == [6, 4, 5]


def test_the_recipes_own_rule_stands_for_one_of_its_label() -> None:
    """Two steps at a time keep more bytes than one."""
    own = replace(recipe_with(0.5), rule=spec(SLTT, chunk=2))
    one, two = (probe(made, rules=PAIR).cost("SLTT") for made in (recipe_with(0.5), own))
    assert one is not None and two is not None and two.peak_saved_bytes > 1.2 * one.peak_saved_bytes


def test_a_recipe_that_does_not_fit_together_is_refused_first() -> None:
    with pytest.raises(ValueError, match=r"SLTT: k must be in 1..T; got k=9, T=4"):
        probe(small_recipe(rule=spec(SLTT, k=9), time_steps=4))


def test_where_memory_ends_the_rule_is_refused_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loss_terms = BPTT._loss_terms

    def full(self: BPTT, *args: Any) -> Any:
        if self.recompute:
            raise torch.OutOfMemoryError
        return loss_terms(self, *args)

    monkeypatch.setattr(BPTT, "_loss_terms", full)
    found = probe(recipe_with(0.5), rules=(spec(BPTT), spec(BPTT, recompute=True)))
    assert [cost.rule for cost in found.costs] == ["BPTT", "SLTT-2"]
    assert found.refused["BPTT-recompute"] == f"BPTT-recompute: {FULL}"


def probe_full_at_the_gradient_of(label: str, monkeypatch: pytest.MonkeyPatch) -> Probe:
    """Memory ends there, after rules were timed."""

    def full(network: Any, rule: Any, *args: Any, **about: Any) -> Any:
        if rule.label == label:
            raise torch.OutOfMemoryError
        return gradients(network, rule, *args, **about)

    monkeypatch.setattr("pipeline.forecast.bench.gradients", full)
    found = probe(recipe_with(0.5), rules=PAIR)
    assert [cost.rule for cost in found.costs] == ["BPTT", "SLTT", "SLTT-2"]
    assert (found.refused, found.uncompared) == ({}, {label: f"{label}'s gradient: {FULL}"})
    return found


def test_where_a_gradient_does_not_fit_its_costs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found = probe_full_at_the_gradient_of("SLTT-2", monkeypatch)
    assert found.fidelity is not None and set(found.fidelity.cosines) == {"BPTT", "SLTT"}
    assert f"not compared: SLTT-2's gradient: {FULL}" in printed(print_probe, found)


def test_without_bptts_gradient_none_is_compared_and_why_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = probe_full_at_the_gradient_of("BPTT", monkeypatch)
    why = f"There is nothing to compare gradients with; BPTT's gradient: {FULL}."
    as_json = json.loads(json.dumps(probe_to_json(found), allow_nan=False))
    assert (as_json["fidelity"], as_json["uncompared"]) == (None, found.uncompared)
    assert as_json["advice"] == advice(found) == why


def test_gradients_that_wait_to_be_compared_are_kept_off_the_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_card = Mock(cpu=lambda: "here")
    monkeypatch.setattr(
        "pipeline.forecast.bench.gradients", lambda *args, **about: {"layers.0": on_card}
    )
    assert Bench(recipe_with(0.5)).gradients_of(spec(BPTT)) == [{"layers.0": "here"}]


def test_a_teacher_that_does_not_fit_is_refused_before_rules_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = Mock(side_effect=torch.OutOfMemoryError)
    monkeypatch.setattr("pipeline.forecast.bench.seconds_of", full)
    monkeypatch.delattr(BatchBench, "cost")
    why = r"^small's teacher: a batch must fit into memory; \d samples at T = 4 do not$"
    for forecast in (probe, partial(sweep, steps=(4,))):
        with pytest.raises(DoesNotFit, match=why):
            forecast(taught())


# ------------------------------------------------------------------------------------------- advice

NEAR = {"a": 0.95, "b": 0.92}


def probed(**rules: tuple[float, float, dict[str, float]]) -> Probe:
    """Of (bytes, seconds, cosines) by rule, beside BPTT's 100 bytes in 1 s."""
    costs = [
        Cost(
            rule=name,
            peak_saved_bytes=int(size),
            state_bytes=50,
            peak_memory_bytes=None,
            rule_bytes=0,
            forward_s=0.0,
            backward_s=seconds,
            loop_s=0.0,
            operations={},
        )
        for name, (size, seconds, _) in {"BPTT": (100, 1.0, {}), **rules}.items()
    ]
    return Probe(
        recipe="r",
        samples=1,
        time_steps=1,
        costs=tuple(costs),
        rounds={cost.rule: (cost.compute_s,) * 3 for cost in costs},
        teacher=None,
        fidelity=Fidelity({}, {name: layers for name, (*_, layers) in rules.items() if layers}),
        refused={},
        uncompared={},
        hardware={"cpu": "a cpu", "gpu": "none", "threads": 1},
    )


def with_own_bytes(*, but: str) -> Probe:
    """OPZO has 55 bytes of its own. Another rule is left out."""
    found = probed(SLTT=(20, 1.0, {"a": 0.95}), OPZO=(15, 1.0, {"a": 0.95}))
    costs = [replace(cost, rule_bytes=55 * (cost.rule == "OPZO")) for cost in found.costs]
    return replace(found, costs=tuple(cost for cost in costs if cost.rule != but))


UNKNOWN = "BPTT's gradient is 0 or not finite"
SILENT = dict.fromkeys("cde", math.nan)


def sltt_full(**rules: tuple[float, float, dict[str, float]]) -> Probe:
    found = probed(SLTT=(20, 0.9, {}), **rules)
    return replace(found, uncompared={"SLTT": f"SLTT's gradient: {FULL}"})


@pytest.mark.parametrize(
    ("found", "parts"),
    [
        (
            probed(
                SLTT=(20, 0.9, NEAR),
                OTTT=(25, 1.0, NEAR),
                cheap=(10, 0.1, {"a": 0.99, "b": 0.3}),
            ),
            [
                "|SLTT is safe here before training: in every layer its gradient has a cosine of"
                " 0.92 or more with BPTT's (lowest at b). It keeps 20% of BPTT's bytes for"
                # 70 of 150
                " backward, and 47% with states. It takes 90% of BPTT's time (90% to 90% in 3"
                " rounds). Such advice was judged for SLTT and OTTT (docs/rules/index.md,"
                ' "Which rule to take").|',
            ],
        ),
        (
            probed(SLTT=(104, 0.9, NEAR)),
            ["It keeps 104% of BPTT's bytes for backward, and 103% with states."],
        ),
        (
            replace(
                probed(SLTT=(20, 0.9, NEAR)),
                rounds={"BPTT": (1.0, 1.0, 2.0), "SLTT": (0.9, 0.8, 2.2)},
            ),
            ["It takes 90% of BPTT's time (80% to 110% in 3 rounds)."],
        ),
        (
            with_own_bytes(but=""),
            ["SLTT is safe", "47% with states."],
        ),
        (
            with_own_bytes(but="SLTT"),
            ["It keeps 15% of BPTT's bytes for backward, and 80% with states and its own bytes."],
        ),
        (
            probed(
                SLTT=(20, 0.9, {"a": 0.7, "b": 0.2}),
                OTTT=(25, 1.0, {"a": 0.4, "b": 0.5}),
                OPZO=(1, 1.0, {"a": float("nan")}),
            ),
            [
                "|No rule is safe here before training. The most similar gradient is that of OTTT,"
                " whose lowest cosine is 0.40, at a. Take BPTT with a smaller micro_batch,"
                " truncated BPTT, or a rule after a run beside BPTT at a smaller size. Such"
            ],
        ),
        # BPTT in slices of time has BPTT's gradient and about its bytes: it is no rule to advise.
        (
            probed(**{"BPTT-chunk-1": (10, 0.5, {})}, SLTT=(20, 0.4, NEAR)),
            [
                "It keeps 20% of BPTT's bytes for backward, and 47% with states. It takes 80% of"
                " the time of BPTT-chunk-1, the fastest form of BPTT (80% to 80%"
            ],
        ),
        (
            probed(SLTT=(20, 0.9, {**NEAR, **SILENT})),
            [
                "|SLTT may be safe here before training: in 2 of 5 layers its gradient has a cosine"
                f" of 0.92 or more with BPTT's (lowest at b). {UNKNOWN} in 3 of 5 layers. It keeps",
            ],
        ),
        (
            probed(SLTT=(20, 0.9, {"a": 0.2, **SILENT})),
            [f"whose lowest cosine is 0.20, at a. {UNKNOWN} in 3 of 4 layers. Take"],
        ),
        (
            probed(SLTT=(20, 0.9, SILENT)),
            [f"|{UNKNOWN} in every layer, so there is nothing to compare gradients with.|"],
        ),
        (
            replace(probed(), refused={"SLTT": f"SLTT: {FULL}"}),
            [f"|There is no gradient to compare with BPTT's; SLTT: {FULL}.|"],
        ),
        (
            replace(
                probed(SLTT=(20, 0.9, {"a": 0.95})), costs=(), refused={"BPTT": f"BPTT: {FULL}"}
            ),
            [f"|There is nothing to compare gradients with; BPTT: {FULL}.|"],
        ),
        (
            sltt_full(),
            [f"|There is no gradient to compare with BPTT's; SLTT's gradient: {FULL}.|"],
        ),
        (
            sltt_full(OTTT=(25, 1.0, {"a": 0.4})),
            [
                "|No rule whose gradient was compared is safe here before training. The most"
                " similar gradient is that of OTTT,"
            ],
        ),
        (
            sltt_full(OTTT=(25, 1.0, {"a": 0.95})),
            ["|OTTT is safe here before training"],
        ),
    ],
)
def test_the_cheapest_rule_that_is_near_in_every_layer_is_advised(
    found: Probe, parts: list[str]
) -> None:
    """A part with | at an end begins or ends the advice."""
    said = f"|{advice(found)}|"
    assert [part for part in parts if part not in said] == []
    assert "may be safe" not in said or "every layer" not in said


def test_time_is_over_the_faster_of_folded_and_stepped_bptt() -> None:
    found = probed(**{"BPTT-chunk-1": (10, 0.5, {})}, SLTT=(20, 0.4, NEAR))
    (line,) = [line for line in printed(print_probe, found) if line.startswith("SLTT  ")]
    assert "×0.20" in line and "400 ms  ×0.80" in line
    assert probe_to_json(found)["time_baseline"] == "BPTT-chunk-1"
