"""`pipeline.compare` of rules on a network and one batch, against counts and gradients computed
here.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import compare
from pipeline.forecast import bench
from pipeline.forecast.bench import RESERVE, BatchBench
from pipeline.recipe import is_baseline
from pipeline.recipe.recipe import Spec, spec
from pipeline.report.rule_comparison import Comparison
from pipeline.rules.base import Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.dropout import Dropout
from pipeline.spiking.encode import repeat
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.synapse import Linear
from tests.helpers.small import finished, small_recipe

T, B, C, N, K = 5, 4, 6, 8, 3
# By rule: the forwards whose tensors are kept at the same time.
KEPT_FORWARDS = {"BPTT": T, "SLTT": 1}


def network(layer: type[nn.Linear] = Linear) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(layer(C, N, bias=False), LIF(0.5), layer(N, K, bias=False))


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return 3 * torch.rand(T, B, C, generator=draw, dtype=dtype), torch.arange(B) % K


def compared(*rules: Rule, **changes: Any) -> Comparison:
    return compare(network(), *batch(), rules=rules, rounds=1, **changes)


@pytest.fixture(scope="module")
def every_rule() -> Comparison:
    return compare(network(), *batch(), rounds=1)


def test_bytes_are_those_of_the_closed_form() -> None:
    """For each forward: the input, a neuron's membrane and spike, and the log-probabilities with
    their sum of weights; and the classes once. The last membrane is a state. SLTT's is saved too.
    """
    values = {rule: T_ * (B * C + 2 * B * N + B * K + 1) for rule, T_ in KEPT_FORWARDS.items()}
    found = {
        cost.rule: (cost.peak_saved_bytes, cost.state_bytes) for cost in compared(SLTT()).costs
    }
    assert found == {
        rule: (4 * value + 8 * B, 4 * B * N * (rule == "BPTT")) for rule, value in values.items()
    }


@pytest.mark.parametrize("steps", [None, T])
def test_a_view_of_a_larger_input_counts_as_one_of_its_own(steps: int | None) -> None:
    """A part of the time steps, or of the samples of a frame."""
    x_TBC, target_B = batch()
    x = x_TBC if steps is None else x_TBC[0].clone()
    sizes = [
        compare(network(), each, target_B, steps=steps, rules=[], rounds=1).costs[0]
        for each in (x, torch.cat([x] * 3)[: len(x)])
    ]
    assert sizes[0].peak_saved_bytes == sizes[1].peak_saved_bytes


@pytest.mark.parametrize("rule", [BPTT, SLTT, OTTT, lambda: SLTT(k=1)])
def test_bytes_are_to_the_byte_those_of_a_run(rule: Callable[[], Rule], tmp_path: Path) -> None:
    made = {"k": 1} if rule().label == "SLTT-1" else {}
    recipe = small_recipe(rule=spec(type(rule()), **made), stop_after=3)
    summary = finished(tmp_path / "run", recipe)
    x_BCHW, target_B = torch.rand(8, 1, 8, 8), torch.arange(8)
    found = compare(recipe.model.build(), x_BCHW, target_B, steps=3, rules=[rule()], rounds=1)
    cost = found.cost(rule().label)
    assert cost is not None
    assert (cost.peak_saved_bytes, cost.state_bytes) == (
        summary["peak_saved_bytes"],
        summary["state_bytes"],
    )


def reference(weights: list[Tensor], *, detached: bool) -> list[Tensor]:
    """The gradients of BPTT, or with `detached` of SLTT, by a loop over time."""
    x_TBC, target_B = batch(torch.float64)
    first, second = (weight.detach().clone().requires_grad_() for weight in weights)
    v_BN, losses = torch.zeros(B, N, dtype=torch.float64), []
    for x_BC in x_TBC:
        u_BN = 0.5 * (v_BN.detach() if detached else v_BN) + x_BC @ first.T
        is_spike_BN = (u_BN >= 1).double()
        slope_BN = (1 - (u_BN - 1).abs()).clamp(min=0).detach()
        s_BN = is_spike_BN + slope_BN * (u_BN - u_BN.detach())
        v_BN = u_BN - is_spike_BN
        losses.append(F.cross_entropy(s_BN @ second.T, target_B))
    torch.stack(losses).mean().backward()
    return [weight.grad for weight in (first, second) if weight.grad is not None]


@pytest.mark.parametrize("layer", [Linear, nn.Linear])
def test_cosines_are_those_of_gradients_from_a_loop(layer: type[nn.Linear]) -> None:
    """By layer, also for layers of torch."""
    net = network(layer).double()
    found = compare(net, *batch(torch.float64), rules=[SLTT()], rounds=1)
    bptt, sltt = (
        reference([net[0].weight, net[2].weight], detached=each)  # type: ignore[list-item]
        for each in (False, True)
    )
    expected = {
        name: F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
        for name, a, b in zip(("0", "2"), bptt, sltt, strict=True)
    }
    assert found.fidelity is not None and expected["0"] < 0.999
    assert found.fidelity.cosines["SLTT"] == pytest.approx(expected, abs=1e-12)
    assert found.fidelity.cosines["BPTT"] == pytest.approx({"0": 1, "2": 1}, abs=1e-12)
    assert found.fidelity.lowest("SLTT")[1] == pytest.approx(min(expected.values()), abs=1e-12)
    net[2].weight.requires_grad = False
    frozen = compare(net, *batch(torch.float64), rules=[SLTT()], rounds=1).fidelity
    assert frozen is not None
    assert frozen.cosines["SLTT"] == pytest.approx({"0": expected["0"]}, abs=1e-12)


def test_every_rule_that_fits_is_measured_and_the_others_say_why(every_rule: Comparison) -> None:
    assert " ".join(cost.rule for cost in every_rule.costs) == (
        "BPTT BPTT-chunk-1 BPTT-recompute SLTT SLTT-1 OTTT-A OPZO"
    )
    assert set(every_rule.refused) == {"DSR", "IDE", "SPIDE"}
    assert every_rule.refused["DSR"].startswith("DSR: every neuron must be a RateIF or RateLIF")
    assert every_rule.fidelity is not None
    assert every_rule.fidelity.lowest("BPTT-chunk-1")[1] == pytest.approx(1, abs=1e-6)
    assert every_rule.largest_batch == {}


def test_tables_have_80_columns_and_everything(every_rule: Comparison) -> None:
    lines = str(every_rule).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "Sequential" and "cosine with BPTT's gradient" in lines
    for cost in every_rule.costs:
        # Where times have many digits, a second table has the last columns.
        row = " ".join(line for line in lines if line.startswith(f"{cost.rule}  "))
        assert f"{cost.peak_saved_bytes / 1e6:.4g} MB" in row
        if not is_baseline(cost.rule):
            assert every_rule.fidelity is not None
            assert f"{every_rule.fidelity.lowest(cost.rule)[1]:.2f}" in row
    text = " ".join(lines)
    assert "not in the tables: - DSR: every" in text and "- IDE, SPIDE: the model must" in text
    assert "safe here" in text
    assert "largest batch" not in text


def test_the_figure_has_a_point_for_each_rule(every_rule: Comparison) -> None:
    [points] = every_rule.figure().data
    assert list(points.text) == [cost.rule for cost in every_rule.costs]
    assert list(points.y) == [cost.all_bytes / 1e6 for cost in every_rule.costs]


@pytest.mark.parametrize(
    ("act", "part", "module"),
    [(str, "the table", "rich"), (Comparison.figure, "the figure", "plotly")],
)
def test_without_its_extra_a_picture_is_refused(
    act: Callable[[Comparison], object],
    part: str,
    module: str,
    every_rule: Comparison,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [*sys.modules, "plotly.graph_objects"]:
        if name.startswith((module, "pipeline.report.forecasts")):
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"compare: {part} needs .*'spiketrain\[report\]'$"):
        act(every_rule)


def test_the_callers_network_and_random_state_are_left_alone() -> None:
    torch.manual_seed(0)
    mine = nn.Sequential(Linear(C, N), BatchNorm(N), LIF(0.5), Dropout(0.5), Linear(N, K)).eval()
    mine[0].weight.grad = gradient = torch.ones(N, C)
    vars(mine)["recorded"] = [2 * mine.get_parameter("0.weight")]  # which `deepcopy` refuses
    before, generator = {**mine.state_dict()}, torch.get_rng_state()
    values = {name: value.clone() for name, value in before.items()}
    with torch.no_grad():  # as in a notebook's cell
        found = compare(mine, *batch(), rules=[SLTT()], memory=10**6, rounds=1)
    assert torch.equal(torch.get_rng_state(), generator) and not mine.training
    assert mine[0].weight.grad is gradient and torch.equal(gradient, torch.ones(N, C))
    assert mine[4].weight.grad is None
    after = mine.state_dict()
    assert all(after[name].data_ptr() == value.data_ptr() for name, value in before.items())
    assert all(torch.equal(after[name], value) for name, value in values.items())
    assert all(getattr(module, "attached_rule", None) is None for module in mine.modules())
    training = compare(mine.train(), *batch(), rules=[SLTT()], rounds=1)
    assert found.costs[0].peak_saved_bytes == training.costs[0].peak_saved_bytes


def test_a_frame_is_repeated_and_a_loss_of_the_users_own_is_differentiated() -> None:
    x_BC, target_B = batch()[0][0], F.one_hot(torch.arange(B) % K, K).float()
    found = [
        compare(network(), x, target_B, rules=[SLTT()], loss=F.mse_loss, rounds=1, **steps)
        for x, steps in ((x_BC, {"steps": T}), (repeat(x_BC, T), {}))
    ]
    one, other = ([asdict(cost)["peak_saved_bytes"] for cost in each.costs] for each in found)
    assert one == other and found[0].time_steps == T
    assert found[0].fidelity == found[1].fidelity
    with_classes = compare(network(), x_BC, torch.arange(B) % K, steps=T, rules=[SLTT()], rounds=1)
    assert with_classes.fidelity != found[0].fidelity


def test_the_largest_batch_leaves_a_reserve_and_no_room_for_an_optimizer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At a peak of 7 MB and 2 MB for each sample."""
    cost = BatchBench.cost

    def made_up(self: BatchBench, rule: Spec) -> Any:
        found = asdict(cost(self, rule)) | {
            "peak_memory_bytes": 7 * 10**6 + 2 * 10**6 * self.samples
        }
        return bench.Cost(**found)

    monkeypatch.setattr(BatchBench, "cost", made_up)
    monkeypatch.setattr("pipeline.forecast.sweep.COARSE", 0)
    found, sample = compared(SLTT(), memory=10**9), 4 * T * C + 8
    weights = 4 * (C * N + N * K)
    left = (1 - RESERVE) * 10**9 - 7 * 10**6 - weights
    expected = left // (2 * 10**6 + sample)
    assert found.largest_batch == {"BPTT": expected, "SLTT": expected}
    assert f"{expected:,.0f}" in str(found) and "for 1 GB" in str(found)


def test_rules_alternate_in_so_many_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    cost = BatchBench.cost

    def noted(self: BatchBench, rule: Spec) -> Any:
        found = cost(self, rule)
        turns.append(found.rule)
        return found

    monkeypatch.setattr(BatchBench, "cost", noted)
    compare(network(), *batch(), rules=[SLTT()], rounds=2)
    assert turns == ["BPTT", "SLTT", "SLTT", "BPTT"]


def attached() -> nn.Module:
    SLTT().attach(made := network())
    return made


@pytest.mark.parametrize(
    ("net", "changes", "said"),
    [
        (attached, {}, "the network must not be attached to a rule; release it from SLTT$"),
        (lambda: Linear(C, K), {}, "must have neurons of pipeline.spiking; got none in Linear:"),
        (lambda: network().requires_grad_(False), {}, "parameter with requires_grad; all of Seq"),
        (network, {"x": torch.ones(C)}, r"x must be time first, .* got x \(6,\), steps=None"),
        (network, {"y": torch.ones(3).long()}, r"y must have B targets, .* y \(3,\), memory=None"),
        (
            network,
            {"x": torch.ones(T, 1, C), "y": torch.ones(1).long(), "memory": 10**9},
            "or 2 with memory; .* memory=1000000000$",
        ),
        (
            lambda: nn.Sequential(LIF(), Linear(C, K), nn.Flatten(0, 1)),
            {},
            r"must map x \[T, B, ...\] to logits \[T, B, K\]; got shape \(20, 3\) for x \(5, 4, 6",
        ),
        (
            network,
            {"x": torch.ones(T, B, C).long()},
            r"must take x as torch.int64 \[5, 4, 6\]; got RuntimeError: \S",
        ),
        (network, {"y": [0, 1, 2, 0]}, "y must be tensors with an axis B; got Tensor and list"),
        (network, {"x": [0.5]}, "must be tensors with an axis B; got list and Tensor"),
        (
            network,
            {"y": torch.arange(B)},
            r"y must be classes 0\.\.2 as int64 \[B\]; got torch.int64 \[4\] from 0 to 3",
        ),
        (network, {"y": torch.ones(B)}, r"classes 0\.\.2 as int64 \[B\]; got torch.float32"),
        (network, {"rules": [SLTT]}, "rules must be a list of rules .* got .*SLTT"),
        (network, {"rules": SLTT()}, r"rules must be a list of rules .* got SLTT\(\)$"),
        (
            network,
            {"rules": [SLTT(), SLTT(chunk=2)]},
            r"different labels, .* got \[SLTT\(\), SLTT\(\)\]$",
        ),
        (network, {"rounds": 0}, "rounds must be a whole number >= 1; got rounds=0"),
        (network, {"memory": 0.5}, "memory must be a whole number >= 1; got memory=0.5"),
        (network, {"over_time": "x"}, "over_time must be 'steps' or 'mean'; got over_time='x'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    net: Callable[[], nn.Module], changes: dict[str, Any], said: str
) -> None:
    x_TBC, target_B = batch()
    with pytest.raises(ValueError, match=rf"^compare: .*{said}"):
        compare(net(), **{"x": x_TBC, "y": target_B, "rules": [], **changes})
