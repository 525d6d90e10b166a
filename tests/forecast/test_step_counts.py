"""Counts without values against the same step with values: bytes, FLOP and kernels to the unit; and
the operations, bytes and roofline of known products.
"""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.data.datasets.synthetic import Synthetic
from pipeline.forecast.bench import Bench, step_inputs
from pipeline.forecast.plan import DEVICES, Device
from pipeline.forecast.step_counts import (
    Counts,
    FakeBench,
    KernelLog,
    Operation,
    count_optimizer,
    count_rule,
    describe_steps,
)
from pipeline.models.feedback import fc_feedback
from pipeline.models.mlp import mlp
from pipeline.recipe.recipe import Recipe, Spec, spec
from pipeline.rules.bptt import BPTT
from pipeline.rules.dsr import DSR
from pipeline.rules.ide import IDE
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.rules.spide import SPIDE
from tests.forecast.test_probe import recipe_with
from tests.helpers.small import recipes_of, small_recipe, train_inline

# Of IDE: with values, too, every solve takes its most iterations.
SOLVED = {"tolerance": 0.0, "iterations": 3}


def figures(counts: Counts) -> dict[str, object]:
    return {**vars(counts), "kernel_log": counts.kernel_log.operations, "forecast_note": ""}


def check(recipe: Recipe, *, samples: int = 2) -> None:
    measured = count_rule(Bench(recipe, batch_size=samples), recipe.rule)
    assert figures(count_rule(FakeBench(recipe, samples), recipe.rule)) == figures(measured)


def tiny(recipe: Recipe) -> Recipe:
    """On made-up data of its shape, without weights of a run, IDE at its most iterations."""
    data, made = recipe.data.build(), recipe.tiny()
    shape = (made.time_steps, *data.shape[1:]) if len(data.shape) == 4 else data.shape
    about = {"samples": 16, "val_samples": 8, "shape": shape, "classes": data.classes}
    rule = made.rule.with_(**SOLVED) if made.rule.target is IDE else made.rule
    return replace(made, data=spec(Synthetic, **about), rule=rule, init=None)


def recipe_of(module: str) -> Recipe:
    return tiny(importlib.import_module(f"recipes.{module}").recipe())


@pytest.mark.parametrize(
    "rule",
    [
        spec(BPTT),
        spec(BPTT, chunk=1),
        spec(BPTT, recompute=True),
        spec(BPTT, truncate=1),
        spec(SLTT),
        spec(SLTT, k=1),
        spec(OTTT),
        spec(OTTT, update="step", first="traced"),
    ],
    ids=lambda rule: rule.build().label,
)
def test_a_rule_is_counted_to_the_unit(rule: Spec) -> None:
    recipe = small_recipe(rule=rule)
    check(replace(recipe, model=recipe.model.with_(blocks=(1,))))


@pytest.mark.parametrize(
    "module",
    [
        "fashion.opzo_ll",
        "fashion.dsr_lif",
        "fashion.ide",
        "continual.split_fashion_hlop_sltt",
        "events.moving_sltt",
        "cifar.cifar10_sltt",  # in bf16, in which torch's fake batch norm would keep its statistics
    ],
)
def test_a_recipe_is_counted_to_the_unit(module: str) -> None:
    """CIFAR's network is small, on images of 16 pixels: some CPUs take 40 times as long for
    convolutions in bf16.
    """
    recipe = recipe_of(module)
    if module.startswith("cifar"):
        model = recipe.model.with_(width=8, blocks=(1, 1))
        recipe = replace(recipe, model=model, data=recipe.data.with_(shape=(3, 16, 16)))
    check(recipe)


FILES = sorted(file for file in Path("recipes").rglob("*.py") if "def recipe()" in file.read_text())


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_recipe_is_counted_to_the_unit(file: Path) -> None:
    """SPIDE through a linear feedback aside, which a CPU computes by events."""
    seen: list[object] = []
    for recipe in map(tiny, recipes_of(file)):
        key = (step_inputs(recipe), recipe.rule)
        by_events = recipe.rule.target is SPIDE and recipe.model.target is fc_feedback
        if key not in seen and not by_events:
            seen.append(key)
            check(recipe)


def test_a_solver_is_counted_at_its_most_iterations() -> None:
    """Each adds as many kernels, also where no limit of the feedback adds its own."""
    recipe = recipe_of("fashion.ide")
    recipe = replace(recipe, model=recipe.model.with_(limit="none"))
    bench, kernels = FakeBench(recipe, 2), []
    for iterations in (1, 2, 4):
        counts = count_rule(bench, recipe.rule.with_(tolerance=1e-5, iterations=iterations))
        assert f", counted with the maximum of {iterations} solver iterations;" in counts.describe()
        kernels.append(counts.kernel_log.kernels)
    assert kernels[2] - kernels[0] == 3 * (kernels[1] - kernels[0]) > 0


def test_spide_is_counted_as_dense_products_and_keeps_the_same_bytes() -> None:
    recipe = recipe_of("fashion.spide")
    measured = count_rule(Bench(recipe, batch_size=2), recipe.rule)
    dense = count_rule(FakeBench(recipe, 2), recipe.rule)
    assert dense.all_bytes == measured.all_bytes
    assert dense.peak_saved_bytes == measured.peak_saved_bytes
    assert dense.kernel_log.flops > measured.kernel_log.flops
    assert "counted with dense products" in dense.describe()


def test_the_optimizer_and_what_it_holds_are_counted_to_the_unit() -> None:
    recipe = small_recipe()
    held, kernel_log = count_optimizer(Bench(recipe))
    fake, counted_ = count_optimizer(FakeBench(recipe, 8))
    assert fake == held and held.optimizer == held.parameters
    assert counted_.operations == kernel_log.operations and kernel_log.kernels > 0


def test_saved_bytes_are_those_of_a_run(tmp_path: Path) -> None:
    recipe = small_recipe(micro_batch=4)
    summary = train_inline(tmp_path / "run", recipe) or {}
    counts = count_rule(FakeBench(recipe, 4), recipe.rule)
    assert counts.peak_saved_bytes == summary["peak_saved_bytes"]
    assert counts.state_bytes == summary["state_bytes"]


def test_a_step_of_any_size_is_counted_without_its_memory() -> None:
    """A batch of a thousand million samples; FLOP grow with the batch, kernels do not."""
    recipe = small_recipe(model=spec(mlp, in_features=64, hidden=(1000,)), rule=spec(BPTT))
    few, many = (count_rule(FakeBench(recipe, samples), recipe.rule) for samples in (10, 10**9))
    assert many.peak_saved_bytes > 10**12 and many.kernel_log.kernels == few.kernel_log.kernels
    assert many.kernel_log.flops == 10**8 * few.kernel_log.flops


class Chooser(nn.Module):
    """A network whose shapes depend on values."""

    def __init__(self, *, classes: int = 10) -> None:
        super().__init__()
        self.linear = nn.Linear(64, classes)

    def forward(self, x_TB: Tensor) -> Tensor:
        x_TBC = x_TB.flatten(2)
        return self.linear(x_TBC) + x_TBC[x_TBC > 0].sum()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (spec(Chooser), "BPTT: a counted step must not depend on values; "),
        (spec(nn.Linear, in_features=3, out_features=10), "BPTT: the step cannot be counted; "),
    ],
)
def test_a_step_that_cannot_be_counted_is_refused_in_a_line(model: Spec, said: str) -> None:
    recipe = small_recipe(model=model, rule=spec(BPTT))
    with pytest.raises(ValueError, match=f"^{said}.+$"):
        count_rule(FakeBench(recipe, 2), recipe.rule)
    (line,) = describe_steps([recipe], 1)
    assert line.startswith(f"not counted: {said}")


def test_a_rule_that_cannot_train_the_network_says_why() -> None:
    with pytest.raises(ValueError, match="DSR: every neuron must be a RateIF or RateLIF"):
        count_rule(FakeBench(recipe_with(0.5), 2), spec(DSR))


def test_the_network_of_a_bench_keeps_its_values() -> None:
    bench = FakeBench(recipe_with(0.5), 2)
    before = {name: value.clone() for name, value in bench.network.state_dict().items()}
    count_rule(bench, spec(SLTT))
    torch.testing.assert_close(dict(bench.network.state_dict()), before, rtol=0, atol=0)


CARD = Device(
    name="made up",
    flops={"fp32": 100.0},
    bandwidth=10.0,
    memory=1e9,
    link=1.0,
    watts=1.0,
    launch=0.5,
    source="this test",
)


def noted(act) -> list[Operation]:
    with KernelLog() as kernel_log:
        act()
    return kernel_log.operations


def test_a_product_reads_both_sides_and_writes_the_result() -> None:
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    assert noted(lambda: a @ b) == [Operation(2 * 3 * 4 * 5, (12 + 20 + 15) * 4)]


def test_views_move_nothing_and_what_is_repeated_is_read_once() -> None:
    x = torch.ones(2, 3)
    assert noted(lambda: x.t().unsqueeze(0).expand(7, 3, 2)) == []
    assert noted(lambda: x.expand(100, 2, 3) + 1) == [Operation(0, (6 + 600) * 4)]


def test_a_backward_is_noted_too() -> None:
    x, weight = torch.ones(3, 4), torch.ones(5, 4, requires_grad=True)
    operations = noted(lambda: torch.nn.functional.linear(x, weight).sum().backward())
    # forward, and the gradient of the weight
    assert [each.flops for each in operations if each.flops] == [2 * 3 * 4 * 5] * 2


def test_the_roofline_takes_the_longer_of_both() -> None:
    assert CARD.busy_s([Operation(1000, 10), Operation(10, 50)], "fp32") == pytest.approx(
        1000 / 100 + 50 / 10
    )


def test_cards_name_their_source() -> None:
    assert len(DEVICES) == 5
    for card in DEVICES.values():
        assert card.source and card.flops["fp32"] < 1e14 and card.memory >= 24e9
