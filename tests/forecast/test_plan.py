"""Plans: counts of the whole step, and what follows from them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.core.errors import DataError
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.forecast.bench import Bench
from pipeline.forecast.plan import DEVICES, Cluster, Plan, Planned, plan
from pipeline.forecast.step_counts import KernelLog, count_optimizer, count_rule
from pipeline.measure.saved_bytes import storage_bytes
from pipeline.recipe.recipe import Recipe, spec
from pipeline.report.forecasts import advice, basis, print_plan
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.train.objective import CrossEntropy
from pipeline.train.teaching import build_teacher
from tests.forecast.test_probe import printed, recipe_with
from tests.train.test_teaching import taught

RULES = (spec(BPTT), spec(SLTT))
H100 = DEVICES["h100"]
PARAMETERS = 4 * (64 * 16 + 16 + 16 * 10 + 10)  # bytes; as many of gradients and of momentum


def made(**changes: Any) -> Recipe:
    """T = 6, 64 samples in a batch."""
    standard = {"rule": spec(SLTT), "time_steps": 6, "batch_size": 64, "backend": "deepspeed"}
    return replace(recipe_with(0.5), **{**standard, **changes})


def on(
    workers: int,
    *,
    rules: Any = RULES,
    samples: int | None = 6400,
    cluster: Mapping[str, Any] = {},
    **changes: Any,
) -> Plan:
    return plan(
        made(**changes),
        Cluster(**{"workers": workers, "device": H100, **cluster}),
        samples=samples,
        rules=rules,
    )


def of(found: Plan, rule: str) -> Planned:
    (planned,) = [each for each in found.rules if each.rule == rule]
    return planned


def test_an_epoch_of_less_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one batch, 64 samples; got 63"):
        on(1, samples=63)


def test_counts_are_those_of_the_whole_micro_batch() -> None:
    """As a bench with values measures them."""
    bench = Bench(made(), batch_size=32)
    measured = [count_rule(bench, rule) for rule in RULES]
    assert [
        (each.rule, each.saved_bytes, each.flops, each.kernels, each.moved_bytes)
        for each in on(2).rules
    ] == [
        (
            of.rule,
            of.peak_saved_bytes,
            of.kernel_log.flops,
            of.kernel_log.kernels,
            of.kernel_log.bytes,
        )
        for of in measured
    ]


@pytest.mark.parametrize(
    ("workers", "zero", "rule", "sent"),
    [
        (8, 0, "SLTT", 2 * 7 / 8 / 450e9),
        (8, 1, "SLTT", (2 + 1) * 7 / 8 / 450e9),
        (8, 2, "SLTT", (6 * 2 + 1) * 7 / 8 / 450e9),
        (8, 2, "BPTT", (2 + 1) * 7 / 8 / 450e9),
        (16, 0, "SLTT", 2 * 15 / 16 / 1e9),
    ],
)
def test_what_is_moved_at_each_stage(workers: int, zero: int, rule: str, sent: float) -> None:
    """In bytes of gradients and parameters over the slowest link; both have 4 bytes a parameter."""
    assert count_optimizer(Bench(made(), batch_size=4))[0].gradients == PARAMETERS
    found = on(workers, zero=zero, cluster={"node_link": 1e9})
    assert of(found, rule).communication_s == pytest.approx(sent * PARAMETERS)


def test_what_is_held_at_each_stage() -> None:
    """SGD with momentum: P of parameters, G of gradients, O of momentum, all as large; a bucket of
    G, a master copy of P / 8.
    """
    held = [of(on(8, zero=zero, rules=()), "SLTT").memory_bytes for zero in (0, 1, 2)]
    more = [(each - held[0]) / PARAMETERS for each in held]
    assert more == pytest.approx([0, 2 + 2 / 8 + 1 - 3, 1 + 1 / 8 + 2 / 8 + 1 - 3])


def test_a_rule_that_moves_the_weights_at_every_step_pays_for_it_every_time() -> None:
    once, each = (
        on(8, rule=spec(OTTT, update=update), rules=()).rules[0] for update in ("batch", "step")
    )
    assert (once.rule, each.rule) == ("OTTT-A", "OTTT-O")
    assert each.communication_s == pytest.approx(6 * once.communication_s)
    assert each.optimizer_s == pytest.approx(6 * once.optimizer_s)


def test_a_step_takes_the_longer_of_its_roofline_and_its_launches() -> None:
    needs = count_rule(Bench(made(), batch_size=64), spec(BPTT)).kernel_log
    waits = on(1, cluster={"device": replace(H100, launch=1.0)})
    assert of(waits, "BPTT").compute_s == pytest.approx(needs.kernels)
    busy = on(1, cluster={"device": replace(H100, launch=1e-12, efficiency=0.5)})
    assert of(busy, "BPTT").compute_s == pytest.approx(H100.busy_s(needs.operations, "fp32") / 0.5)
    _, optimizer = count_optimizer(Bench(made(), batch_size=4))
    assert of(on(1), "BPTT").optimizer_s == pytest.approx(
        H100.busy_s(optimizer.operations, "fp32") / H100.efficiency
    )


def test_a_card_computes_in_tf32_what_is_to_be_computed_so() -> None:
    """Counted on a machine without it, and priced by the card's own rate."""
    card = replace(H100, flops={"fp32": 1e9, "tf32": 8e9}, launch=1e-12, bandwidth=1e18)
    (ieee,), (tf32,) = (
        on(1, precision=each, cluster={"device": card}, rules=()).rules for each in ("fp32", "tf32")
    )
    assert ieee.compute_s == pytest.approx(8 * tf32.compute_s)


def test_recordings_are_planned_at_their_own_length() -> None:
    found = on(
        1, data=spec(Synthetic, samples=64, val_samples=20, shape=(6, 1, 8, 8)), samples=None
    )
    assert found.samples == 64 and not found.refused


def test_without_the_data_and_their_number_hours_are_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(recipe: Recipe) -> int:
        raise DataError("not here")

    monkeypatch.setattr("pipeline.forecast.plan.samples_per_epoch", missing)
    found = on(1, samples=None, cluster={"price": 3.0}, rules=())
    (planned,) = found.rules
    assert (found.samples, planned.hours, planned.kwh, planned.cost) == (None, None, None, None)
    assert planned.images_per_s > 0
    assert "Hours need --samples, because the data set is not on this machine." in basis(found)
    [head] = [line for line in printed(print_plan, found) if line.startswith("rule")]
    assert head.split()[-1] == "images/s"


def test_hours_energy_and_cost_follow_from_the_step() -> None:
    planned = of(on(8, cluster={"price": 3.0}, epochs=5, rules=(), rule=spec(BPTT)), "BPTT")
    hours = 6400 // 64 * 5 * planned.step_s / 3600
    assert (planned.hours, planned.kwh, planned.cost, planned.images_per_s) == pytest.approx(
        (hours, hours * 8 * 0.7, hours * 8 * 3, 64 / planned.step_s)
    )


def test_a_small_card_takes_smaller_micro_batches_and_a_tiny_one_refuses() -> None:
    def with_memory(size: float) -> Plan:
        return on(1, cluster={"device": replace(H100, memory=size)}, rules=(), rule=spec(BPTT))

    (whole,) = with_memory(H100.memory).rules
    (smaller,) = with_memory(0.6 * whole.memory_bytes / 0.9).rules
    assert (whole.micro_batch, whole.accumulation) == (64, 1)
    assert smaller.micro_batch * smaller.accumulation == 64 and smaller.accumulation > 1
    assert smaller.memory_bytes < 0.6 * whole.memory_bytes
    refused = with_memory(1000.0)
    assert refused.rules == () and advice(refused) == "No rule fits."
    assert refused.refused["BPTT"].endswith(" GB per worker; 9e-07 GB are available")


def test_a_teacher_is_in_every_rules_time_and_bytes() -> None:
    """On a card its kernels are too small to be waited for: two micro-batches of as many launches
    each.
    """
    recipe = replace(taught(), backend="deepspeed")
    alone = replace(recipe, teacher=None, objective=spec(CrossEntropy))
    cluster = Cluster(workers=1, device=H100)
    found, without = (plan(each, cluster, samples=64, rules=RULES) for each in (recipe, alone))
    teacher, kernels = _teacher_of(recipe)
    assert (found.teacher, found.teacher_bytes) == ("test_efficientnet", teacher)
    assert without.teacher is None
    for with_, untaught in zip(found.rules, without.rules, strict=True):
        assert (with_.teacher_s, untaught.teacher_s) == pytest.approx(
            (2 * kernels * H100.launch, 0)
        )
        assert with_.step_s == pytest.approx(untaught.step_s + with_.teacher_s)
        assert with_.memory_bytes == pytest.approx(untaught.memory_bytes + teacher)
    said = f"include the teacher test_efficientnet with {teacher / 1e6:.4g} MB of weights."
    assert basis(found).endswith(said) and "teacher" not in basis(without)
    [head] = [line for line in printed(print_plan, found) if line.startswith("rule")]
    assert "compute ms  teacher ms" in head


def _teacher_of(recipe: Recipe) -> tuple[int, int]:
    """Bytes of its weights, statistics and a head for 10 classes, and the kernels of an answer,
    counted by hand.
    """
    teacher = build_teacher(recipe.with_untrained_teacher(), recipe.data.build())
    x_B = torch.zeros(2, 1, 8, 8)
    teacher.head = nn.Linear(teacher.features(x_B).shape[-1], 10)
    with KernelLog() as kernel_log:
        teacher(x_B)
    return storage_bytes((*teacher.parameters(), *teacher.buffers())), kernel_log.kernels
