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

import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import save_file

from pipeline.cli.forecast import _threads
from pipeline.forecast.bench import DRAWS, RULES, Bench, Cost, DoesNotFit
from pipeline.forecast.probe import Probe, advice, probe
from pipeline.forecast.sweep import sweep
from pipeline.measure.fidelity import Fidelity, gradients
from pipeline.models.mlp import mlp
from pipeline.recipe.recipe import Recipe, Spec, spec
from pipeline.report.forecasts import print_probe, probe_to_json
from pipeline.rules.bptt import BPTT
from pipeline.rules.hlop import HLOP
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF
from tests.helpers.small import command, small_recipe
from tests.train.test_teaching import taught


def recipe_with(decay: float, **changes: object) -> Recipe:
    """64-16-10 at T = 4, without norms."""
    network = spec(mlp, in_features=64, hidden=(16,), neuron=spec(LIF, decay=decay))
    return small_recipe(model=network, rule=spec(SLTT, k=2), time_steps=4, **changes)


@pytest.fixture(scope="module")
def found() -> Probe:
    return probe(recipe_with(0.5))


def test_a_rule_that_draws_time_steps_is_looked_at_in_several_draws_inside_another_too() -> None:
    bench = Bench(recipe_with(0.5), batch_size=4)
    rules = (spec(SLTT, k=1), spec(HLOP, inner=spec(SLTT, k=1), rows=((3, 2),)), spec(SLTT))
    assert [len(bench.gradients(rule)) for rule in rules] == [DRAWS, DRAWS, 1]


def test_every_rule_that_fits_is_probed_and_the_others_say_why(found: Probe) -> None:
    assert [cost.rule for cost in found.costs] == [
        "BPTT",
        "BPTT-chunk-1",
        "BPTT-recompute",
        "SLTT",
        "SLTT-1",
        "OTTT-A",
        "OPZO",
        "SLTT-2",
    ]
    assert set(found.refused) == {"DSR", "IDE", "SPIDE"} and len(RULES) == 10
    assert (found.samples, found.time_steps) == (8, 4)
    assert found.refused["DSR"].startswith("DSR: every neuron must be a RateIF or RateLIF")


def test_costs_are_those_of_the_rules(found: Probe) -> None:
    costs = {cost.rule: cost for cost in found.costs}
    assert costs["SLTT"].peak_saved_bytes < 0.5 * costs["BPTT"].peak_saved_bytes
    assert costs["SLTT-1"].operations["error"]["dense"] == pytest.approx(
        costs["SLTT"].operations["error"]["dense"] / 4
    )
    assert (
        costs["BPTT"].operations["forward"]["dense"] == 64 * 16 + 4 * 16 * 10
    )  # a still image meets its synapse once
    assert costs["BPTT-recompute"].operations["recomputation"]["dense"] == 4 * (64 * 16 + 16 * 10)
    assert set(costs["OPZO"].operations) == {"forward", "weights", "feedback"}
    assert all(cost.forward_s > 0 and cost.backward_s > 0 for cost in found.costs)


def test_what_a_rule_has_of_its_own_is_told_where_one_has(found: Probe) -> None:
    """OPZO's matrix of 16 neurons and 10 outputs, the sum that it learns from, and the count of its
    moves.
    """
    own = {cost.rule: cost.rule_bytes for cost in found.costs}
    assert own == dict.fromkeys(own, 0) | {"OPZO": 2 * 16 * 10 * 4 + 8}
    print_probe(found, console=Console(file=(out := io.StringIO()), width=250))
    assert "rule's own" in out.getvalue() and "0.001288 MB" in out.getvalue()
    print_probe(
        probed(SLTT=(20, 0.9, {"a": 0.95})), console=Console(file=(out := io.StringIO()), width=250)
    )
    assert "rule's own" not in out.getvalue()


def test_fidelity_is_of_every_synapse(found: Probe) -> None:
    assert found.fidelity is not None
    layers = {"layers.0", "classifier"}
    assert set(found.fidelity.temporal_share) == layers == set(found.fidelity.cosines["SLTT"])
    assert found.fidelity.cosines["BPTT-recompute"] == dict.fromkeys(layers, pytest.approx(1))
    assert found.fidelity.temporal_share["classifier"] == pytest.approx(
        0, abs=1e-6
    )  # a readout without membrane


def test_without_a_leak_nothing_comes_through_time() -> None:
    forgetful = probe(recipe_with(0.0), rules=(spec(BPTT), spec(SLTT))).fidelity
    assert forgetful is not None
    assert forgetful.temporal_share["layers.0"] == pytest.approx(0, abs=1e-6)


def test_the_network_is_the_recipes_and_rests() -> None:
    """Two probes of one recipe agree in everything but time."""
    one, other = (probe(recipe_with(0.5), rules=(spec(BPTT), spec(SLTT))) for _ in range(2))
    assert one.fidelity == other.fidelity
    assert [cost.operations for cost in one.costs] == [cost.operations for cost in other.costs]


def test_a_recipe_that_starts_from_weights_is_probed_with_them(tmp_path: Path) -> None:
    """Of a network that is silent but for its readout, whose bias alone is not 0, no gradient
    reaches the first layer.
    """
    silent = {
        name: torch.zeros_like(value)
        for name, value in recipe_with(0.5).model.build().state_dict().items()
    }
    save_file({**silent, "classifier.bias": torch.ones(10)}, tmp_path / "start.safetensors")
    recipe = recipe_with(0.5, init=str(tmp_path / "start.safetensors"))
    found = probe(recipe, rules=(spec(BPTT), spec(SLTT))).fidelity
    assert found is not None and math.isnan(found.temporal_share["layers.0"])
    assert torch.equal(
        Bench(recipe, batch_size=2).network.state_dict()["classifier.bias"], torch.ones(10)
    )


def test_a_taught_recipe_is_probed_with_labels_and_its_teacher_is_told_beside() -> None:
    found = probe(taught(), rules=(spec(BPTT),))
    assert [cost.rule for cost in found.costs] == ["BPTT", "SLTT-1"]
    assert (
        found.teacher is not None
        and found.teacher.teacher == "test_efficientnet"
        and found.teacher.seconds > 0
    )
    assert found.teacher.bytes > 4 * sum(
        each.numel() for each in timm.create_model("test_efficientnet").parameters()
    )
    out = io.StringIO()
    print_probe(found, console=Console(file=out, width=200))
    assert (
        "the teacher, test_efficientnet, is in no row: beside every rule it holds" in out.getvalue()
    )
    assert probe_to_json(found)["teacher"]["bytes"] == found.teacher.bytes


def test_rules_take_turns_and_the_median_of_the_rounds_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a machine that gets slower with every look."""
    turns: list[str] = []
    cost = Bench.cost

    def slower(self: Bench, rule: Spec) -> Cost:
        found = cost(self, rule)
        turns.append(found.rule)
        return replace(found, forward_s=float(len(turns)), backward_s=0.0)

    monkeypatch.setattr(Bench, "cost", slower)
    found = probe(recipe_with(0.5), rules=(spec(BPTT), spec(SLTT)))
    assert turns == ["BPTT", "SLTT", "SLTT-2", "SLTT", "SLTT-2", "BPTT", "SLTT-2", "BPTT", "SLTT"]
    assert found.rounds == {"BPTT": (1, 6, 8), "SLTT": (2, 4, 9), "SLTT-2": (3, 5, 7)}
    assert [each.forward_s for each in found.costs] == [6, 4, 5]
    assert found.share_of_time("SLTT") == (2, 4 / 6, 9 / 8)
    turns.clear()
    points = sweep(recipe_with(0.5), steps=(2,), rules=(spec(BPTT), spec(SLTT))).points
    assert [point.cost.forward_s for point in points] == [6, 4, 5]


def test_the_recipes_own_rule_stands_for_one_of_its_label() -> None:
    """Two steps at a time keep more bytes than one."""
    own = replace(recipe_with(0.5), rule=spec(SLTT, chunk=2))
    one, two = (
        probe(made, rules=(spec(BPTT), spec(SLTT))).cost("SLTT") for made in (recipe_with(0.5), own)
    )
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
    assert (
        found.refused["BPTT-recompute"]
        == "BPTT-recompute: a batch must fit into memory; 8 samples at T = 4 do not"
    )


def full_at_the_gradient_of(monkeypatch: pytest.MonkeyPatch, *labels: str) -> None:
    """Memory ends there, after rules were timed."""

    def full(network: Any, rule: Any, *args: Any, **about: Any) -> Any:
        if rule.label in labels:
            raise torch.OutOfMemoryError
        return gradients(network, rule, *args, **about)

    monkeypatch.setattr("pipeline.forecast.bench.gradients", full)


def test_where_a_gradient_does_not_fit_its_costs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    full_at_the_gradient_of(monkeypatch, "SLTT-2")
    found = probe(recipe_with(0.5), rules=(spec(BPTT), spec(SLTT)))
    why = "SLTT-2's gradient: a batch must fit into memory; 8 samples at T = 4 do not"
    assert [cost.rule for cost in found.costs] == ["BPTT", "SLTT", "SLTT-2"]
    assert found.fidelity is not None and set(found.fidelity.cosines) == {"SLTT"}
    assert (found.refused, found.uncompared) == ({}, {"SLTT-2": why})
    print_probe(found, console=Console(file=(out := io.StringIO()), width=200))
    assert f"\nnot compared: {why}\n" in out.getvalue()


class OnCard:
    """A gradient there."""

    def cpu(self) -> str:
        return "here"


def test_gradients_that_wait_to_be_compared_are_kept_off_the_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "pipeline.forecast.bench.gradients", lambda *args, **about: {"layers.0": OnCard()}
    )
    assert Bench(recipe_with(0.5)).gradients(spec(BPTT)) == [{"layers.0": "here"}]


def test_without_bptts_gradient_none_is_compared_and_why_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full_at_the_gradient_of(monkeypatch, "BPTT")
    found = probe(recipe_with(0.5), rules=(spec(BPTT), spec(SLTT)))
    assert [cost.rule for cost in found.costs] == [
        "BPTT",
        "SLTT",
        "SLTT-2",
    ] and found.fidelity is None
    why = "BPTT's gradient: a batch must fit into memory; 8 samples at T = 4 do not"
    assert advice(found) == f"There is nothing to compare gradients with; {why}."
    told = json.loads(json.dumps(probe_to_json(found), allow_nan=False))
    assert (
        told["fidelity"] is None
        and told["uncompared"] == {"BPTT": why}
        and told["advice"] == advice(found)
    )


def test_a_teacher_that_does_not_fit_is_refused_before_rules_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(act: Callable[[], object], device: torch.device) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("pipeline.forecast.bench.seconds_of", full)
    monkeypatch.delattr(Bench, "cost")
    why = r"^small's teacher: a batch must fit into memory; \d samples at T = 4 do not$"
    for forecast in (probe, partial(sweep, steps=(4,))):
        with pytest.raises(DoesNotFit, match=why):
            forecast(taught())


# ------------------------------------------------------------------------------------------- advice


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
    cosines = {name: layers for name, (_, _, layers) in rules.items() if layers}
    return Probe(
        recipe="r",
        samples=1,
        time_steps=1,
        costs=tuple(costs),
        rounds={cost.rule: (cost.compute_s,) * 3 for cost in costs},
        teacher=None,
        fidelity=Fidelity({}, cosines),
        refused={},
        uncompared={},
        hardware={"cpu": "a cpu", "gpu": "none", "threads": 1},
    )


def test_what_a_rule_has_of_its_own_is_not_saved() -> None:
    found = probed(SLTT=(20, 1.0, {"a": 0.95}), OPZO=(15, 1.0, {"a": 0.95}))
    bptt, sltt, opzo = found.costs
    heavy = replace(found, costs=(bptt, sltt, replace(opzo, rule_bytes=55)))
    assert "SLTT is safe" in advice(heavy) and "47% with states, so it saves 53%" in advice(heavy)
    alone = replace(found, costs=(bptt, replace(opzo, rule_bytes=55)))
    assert (
        "it keeps 15% of BPTT's bytes for backward, 80% with states and the rule's own, so it"
        " saves 20%" in advice(alone)
    )


def test_the_cheapest_rule_that_is_near_in_every_layer_is_advised() -> None:
    near, far = {"a": 0.95, "b": 0.92}, {"a": 0.99, "b": 0.3}
    said = advice(probed(SLTT=(20, 0.9, near), OTTT=(25, 1.0, near), cheap=(10, 0.1, far)))
    assert said.startswith("SLTT is safe here before training")
    assert (
        "0.92 or more" in said
        and "least at b" in said
        and "20% of BPTT's bytes" in said
        and "90% of its time" in said
    )
    assert (
        "keeps 20% of BPTT's bytes for backward, 47% with states, so it saves 53%" in said
    )  # 70 of 150
    assert (
        "keeps 104% of BPTT's bytes for backward, 103% with states, so it saves nothing"
        in advice(probed(SLTT=(104, 0.9, near)))
    )
    found = replace(
        probed(SLTT=(20, 0.9, near)), rounds={"BPTT": (1.0, 1.0, 2.0), "SLTT": (0.9, 0.8, 2.2)}
    )
    assert advice(found).endswith("and takes 90% of its time, 80% to 110% in 3 rounds.")


def test_where_none_is_near_the_nearest_is_named() -> None:
    said = advice(
        probed(
            SLTT=(20, 0.9, {"a": 0.7, "b": 0.2}),
            OTTT=(25, 1.0, {"a": 0.4, "b": 0.5}),
            OPZO=(1, 1.0, {"a": float("nan")}),
        )
    )
    assert said.startswith(
        "No rule's gradient is near BPTT's in every layer: the nearest is OTTT, with a cosine of"
        " 0.40 at a."
    )


def test_time_is_over_the_faster_of_folded_and_stepped_bptt() -> None:
    """Which has BPTT's gradient and about its bytes: it is no rule to advise."""
    near = {"a": 0.95, "b": 0.92}
    found = probed(**{"BPTT-chunk-1": (10, 0.5, {})}, SLTT=(20, 0.4, near))
    assert found.time_baseline is not None and found.time_baseline.rule == "BPTT-chunk-1"
    said = (
        "it keeps 20% of BPTT's bytes for backward, 47% with states, so it saves 53%, "
        "and takes 80% of the time of BPTT-chunk-1, the faster BPTT"
    )
    assert f"{said}, 80% to 80%" in advice(found)
    console = Console(file=io.StringIO(), width=200)
    print_probe(found, console=console)
    file: Any = console.file
    (line,) = [line for line in file.getvalue().splitlines() if line.startswith("SLTT  ")]
    assert "×0.20" in line and "400 ms  ×0.80" in line
    assert probe_to_json(found)["time_baseline"] == "BPTT-chunk-1"


def test_no_rule_is_called_safe_on_layers_that_nobody_can_compare() -> None:
    silent = dict.fromkeys("cde", math.nan)
    said = advice(probed(SLTT=(20, 0.9, {"a": 0.95, "b": 0.92, **silent})))
    assert said.startswith(
        "SLTT is near BPTT here before training, but not known to be safe: its gradient has a"
        " cosine of 0.92"
    )
    assert (
        "in 2 of 5 layers; BPTT's gradient is 0 or not finite in the others" in said
        and "every layer" not in said
    )
    said = advice(probed(SLTT=(20, 0.9, {"a": 0.2, **silent})))
    assert "a cosine of 0.20 at a. BPTT's gradient is 0 or not finite in 3 of 4 layers." in said
    said = advice(probed(SLTT=(20, 0.9, silent)))
    assert (
        said == "BPTT's gradient is 0 or not finite in every layer, so there is nothing to compare"
        " gradients with."
    )
    why = {"SLTT": "SLTT: a batch must fit into memory; 8 samples at T = 4 do not"}
    assert (
        advice(replace(probed(), refused=why))
        == f"There is no rule to compare with BPTT; {why['SLTT']}."
    )
    found = probed(SLTT=(20, 0.9, {"a": 0.95}))
    why = {"BPTT": "BPTT: a batch must fit into memory; 8 samples at T = 4 do not"}
    without = replace(
        found, costs=tuple(cost for cost in found.costs if cost.rule != "BPTT"), refused=why
    )
    assert advice(without) == f"There is nothing to compare gradients with; {why['BPTT']}."


def test_what_was_not_compared_is_neither_near_nor_far() -> None:
    why = {"SLTT": "SLTT's gradient: a batch must fit into memory; 8 samples at T = 4 do not"}
    said = advice(replace(probed(SLTT=(20, 0.9, {})), uncompared=why))
    assert said == f"There is no gradient to compare with BPTT's; {why['SLTT']}."
    said = advice(replace(probed(SLTT=(20, 0.9, {}), OTTT=(25, 1.0, {"a": 0.4})), uncompared=why))
    assert said.startswith(
        "No gradient that was compared is near BPTT's in every layer: the nearest is OTTT, with a"
        " cosine"
    )
    said = advice(replace(probed(SLTT=(20, 0.9, {}), OTTT=(25, 1.0, {"a": 0.95})), uncompared=why))
    assert said.startswith("OTTT is safe here before training")


# ------------------------------------------------------------------------------------- command line

RECIPE = """
from tests.helpers.small import small_recipe
from pipeline.recipe.recipe import spec
from pipeline.models.mlp import mlp

def recipe():
    return small_recipe(model=spec(mlp, in_features=64, hidden=(16,)))
"""


def test_the_command_prints_tables_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(RECIPE)
    run = command(monkeypatch, capsys)
    code, out, err = run("probe", str(file), "--batch", "4")
    assert (code, err) == (0, "")
    assert (
        "one batch of 4 samples, T = 3, before any training" in out
        and "temporal share" in out
        and "not in the tables: DSR" in out
    )
    code, out, _ = run("probe", str(file), "--format", "json")
    told = json.loads(out)
    assert {cost["rule"] for cost in told["costs"]} >= {"BPTT", "SLTT"} and told["advice"]


TWO_NETWORKS = """
from dataclasses import replace
from pipeline.models.mlp import mlp
from pipeline.recipe.recipe import spec
from pipeline.rules.bptt import BPTT
from tests.helpers.small import small_recipe

def recipe():
    one = small_recipe(model=spec(mlp, in_features=64, hidden=(8,)))
    bptt = replace(one, name="bptt", rule=spec(BPTT))
    return [one, bptt, replace(one, name="wide", micro_batch=4)]
"""

SEVERAL = """
    one = small_recipe(model=spec(mlp, in_features=64, hidden=(8,)), rule=spec(SLTT))
    bptt = replace(one, name="bptt", rule=spec(BPTT))
    rules = [one, bptt, replace(one, name="two", rule=spec(SLTT, k=2), seed=1)]
    return [*rules, replace(one, name="wide", init="@bptt", micro_batch=4)]
"""


def test_of_several_recipes_each_network_is_probed_once_with_all_their_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    imports = (
        "from dataclasses import replace\nfrom pipeline.rules.bptt import BPTT\nfrom"
        " pipeline.rules.sltt import SLTT\n"
    )
    file.write_text(imports + RECIPE[: RECIPE.index("    return")] + SEVERAL)
    monkeypatch.setattr("pipeline.forecast.bench.RULES", (spec(BPTT),))
    run = command(monkeypatch, capsys)
    code, out, err = run("probe", str(file))
    assert (code, err) == (0, "")
    assert out.count("one batch of 8 samples") == out.count("one batch of 4 samples") == 1
    assert "small, bptt, two" in out and "\nwide" in out
    code, out, _ = run("probe", str(file), "--format", "json")
    assert [
        (each["recipe"], [cost["rule"] for cost in each["costs"]]) for each in json.loads(out)
    ] == [
        ("small, bptt, two", ["BPTT", "SLTT", "SLTT-2"]),
        ("wide", ["BPTT", "SLTT"]),
    ]


def test_a_worker_gets_the_cores_that_a_launch_would_give_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One on a CPU; on a card its share of the node."""
    assert (_threads("probe", "auto"), _threads("probe", "3")) == (1, 3)
    monkeypatch.setattr("pipeline.core.cores.cores_here", lambda: 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _threads("probe", "auto") == 8
    with pytest.raises(
        ValueError, match="probe: --cpus-per-worker must be a number of cores or auto; got x"
    ):
        _threads("probe", "x")


def test_bad_use_ends_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = command(monkeypatch, capsys)
    file = tmp_path / "mine.py"
    file.write_text(RECIPE)
    code, _, err = run("probe", str(file), "--batch", "1000")
    assert code == 2 and err.count("\n") == 1
