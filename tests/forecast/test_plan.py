"""Plans: counts of the whole step, and what follows from them (benchmarks/planned.py: how near)."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from pipeline.core.errors import DataError
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.forecast.bench import RESERVE, Bench
from pipeline.forecast.counts import Traffic, counted, counted_optimizer
from pipeline.forecast.devices import DEVICES, Device, Operation
from pipeline.forecast.plan import LIMIT, Cluster, Plan, Planned, _at, _Planner, plan
from pipeline.recipe.recipe import Evaluation, Recipe, Spec, spec, write_json
from pipeline.report.forecasts import advice, basis, print_plan
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.train.guards.anomaly import AnomalyGuard
from pipeline.train.objective import CrossEntropy
from pipeline.train.recovery import SkipBatch
from pipeline.train.teaching import build_teacher
from tests.forecast.test_probe import RECIPE, TWO_NETWORKS, recipe_with
from tests.helpers.small import command, recipes_of, train_inline
from tests.train.test_teaching import taught

RULES = (spec(BPTT), spec(SLTT))
H100 = DEVICES["h100"]


def made(**changes: Any) -> Recipe:
    """T = 6, 64 samples in a batch."""
    return replace(
        recipe_with(0.5),
        **{"rule": spec(SLTT), **changes},
        time_steps=6,
        batch_size=64,
        backend="deepspeed",
    )


def on(workers: int, **changes: Any) -> Plan:
    cluster = Cluster(workers=workers, device=H100, **changes.pop("cluster", {}))
    return plan(made(**changes), cluster, samples=6400, rules=RULES)


def test_an_epoch_without_a_whole_batch_is_no_plan() -> None:
    with pytest.raises(
        ValueError, match="an epoch must have a batch of 64 samples at least; got 63"
    ):
        plan(made(), Cluster(workers=1, device=H100), samples=63, rules=RULES)


def on_rules(workers: int, rules: Sequence[Spec], device: Device = H100) -> Plan:
    recipe = made(rule=rules[0])
    return plan(recipe, Cluster(workers=workers, device=device), samples=6400, rules=rules)


def of(found: Plan, rule: str) -> Planned:
    (planned,) = [each for each in found.rules if each.rule == rule]
    return planned


def test_counts_are_those_of_the_whole_micro_batch() -> None:
    """As a bench with values measures them."""
    found, bench = on(2), Bench(made(), batch_size=32)
    for rule in RULES:
        planned, measured = of(found, rule.build().label), counted(bench, rule)
        assert planned.saved_bytes == measured.peak_saved_bytes
        assert (planned.flops, planned.kernels) == (
            measured.traffic.flops,
            measured.traffic.kernels,
        )
        assert planned.moved_bytes == measured.traffic.bytes


def test_what_is_moved_at_each_stage() -> None:
    """In bytes over the slowest link: G of gradients, P of parameters, both 4 bytes a parameter
    here.
    """
    P = G = 4 * (64 * 16 + 16 + 16 * 10 + 10)
    assert Bench(made(), batch_size=4).held().gradients == G
    seconds = {zero: on(8, zero=zero) for zero in (0, 1, 2)}
    assert of(seconds[0], "SLTT").communication_s == pytest.approx(2 * 7 / 8 * G / 450e9)
    assert of(seconds[1], "SLTT").communication_s == pytest.approx(7 / 8 * (2 * G + P) / 450e9)
    assert of(seconds[2], "SLTT").communication_s == pytest.approx(7 / 8 * (6 * 2 * G + P) / 450e9)
    assert of(seconds[2], "BPTT").communication_s == pytest.approx(7 / 8 * (2 * G + P) / 450e9)
    across = on(16, cluster={"node_link": 1e9})
    assert of(across, "SLTT").communication_s == pytest.approx(2 * 15 / 16 * G / 1e9)


def test_what_is_held_at_each_stage() -> None:
    """SGD with momentum: P of parameters, G of gradients, O of momentum, all as large; a bucket of
    G, a master copy of P / 8.
    """
    P = 4 * (64 * 16 + 16 + 16 * 10 + 10)
    kept = of(on(8), "SLTT").memory_bytes - 3 * P
    assert of(on(8, zero=1), "SLTT").memory_bytes == pytest.approx(kept + 2 * P + 2 * P / 8 + P)
    assert of(on(8, zero=2), "SLTT").memory_bytes == pytest.approx(kept + P + P / 8 + 2 * P / 8 + P)


def test_a_rule_that_moves_the_weights_at_every_step_pays_for_it_every_time() -> None:
    once, each = (on_rules(8, (spec(OTTT, update=update),)) for update in ("batch", "step"))
    assert of(each, "OTTT-O").communication_s == pytest.approx(
        6 * of(once, "OTTT-A").communication_s
    )
    assert of(each, "OTTT-O").optimizer_s == pytest.approx(6 * of(once, "OTTT-A").optimizer_s)


def test_a_step_takes_the_longer_of_its_roofline_and_its_launches() -> None:
    needs = counted(Bench(made(), batch_size=64), spec(BPTT)).traffic
    waits = on_rules(1, RULES, device=replace(H100, launch=1.0))
    assert of(waits, "BPTT").compute_s == pytest.approx(needs.kernels)
    busy = on_rules(1, RULES, device=replace(H100, launch=1e-12, efficiency=0.5))
    assert of(busy, "BPTT").compute_s == pytest.approx(H100.busy_s(needs.operations, "fp32") / 0.5)


def test_the_optimizer_moves_what_it_was_counted_to_move() -> None:
    _, optimizer = counted_optimizer(Bench(made(), batch_size=4))
    expected = H100.busy_s(optimizer.operations, "fp32") / H100.efficiency
    assert of(on(1), "BPTT").optimizer_s == pytest.approx(expected)


def test_a_card_computes_in_tf32_what_is_to_be_computed_so() -> None:
    """Counted on a machine without it, and priced by the card's own rate."""
    card = replace(H100, flops={"fp32": 1e9, "tf32": 8e9}, launch=1e-12, bandwidth=1e18)
    cluster = Cluster(workers=1, device=card)
    ieee, tf32 = (
        plan(made(precision=each), cluster, samples=6400, rules=RULES) for each in ("fp32", "tf32")
    )
    assert of(ieee, "BPTT").compute_s == pytest.approx(8 * of(tf32, "BPTT").compute_s)


def test_tf32_is_not_tried_where_there_is_none() -> None:
    said = "recipe: precision='tf32' must have an NVIDIA card"
    with pytest.raises(ValueError, match=said):
        Bench(made(precision="tf32"), batch_size=4)
    with pytest.raises(ValueError, match=said):
        plan(made(precision="tf32"), Cluster(workers=1), rules=())


def test_recordings_are_planned_at_their_own_length() -> None:
    recipe = made(data=spec(Synthetic, samples=64, val_samples=20, shape=(6, 1, 8, 8)))
    found = plan(recipe, Cluster(workers=1, device=H100), rules=RULES)
    assert found.samples == 64 and not found.refused


def test_without_the_data_and_their_number_hours_are_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(recipe: Recipe) -> int:
        raise DataError("not here")

    monkeypatch.setattr("pipeline.forecast.plan.samples_per_epoch", missing)
    found = plan(made(), Cluster(workers=1, device=H100, price=3.0), rules=RULES)
    planned = of(found, "BPTT")
    assert (found.samples, planned.hours, planned.kwh, planned.cost) == (None, None, None, None)
    assert planned.images_per_s > 0 and "Hours need --samples: the data are not here." in basis(
        found
    )
    print_plan(found, console=Console(file=(out := io.StringIO()), width=200))
    [head] = [line for line in out.getvalue().splitlines() if line.startswith("rule")]
    assert head.split()[-1] == "images/s"


def test_hours_energy_and_cost_follow_from_the_step() -> None:
    planned = of(on(8, cluster={"price": 3.0}, epochs=5), "BPTT")
    assert planned.hours is not None and planned.hours == pytest.approx(
        6400 // 64 * 5 * planned.step_s / 3600
    )
    assert planned.kwh == pytest.approx(planned.hours * 8 * 0.7)
    assert planned.cost == pytest.approx(planned.hours * 8 * 3)
    assert planned.images_per_s == pytest.approx(64 / planned.step_s)


def test_a_small_plan_is_not_for_nothing_and_says_what_its_energy_is() -> None:
    found = on(1, cluster={"price": 3.0})
    large = replace(of(found, "BPTT"), kwh=12_345.6, cost=0.00123)
    print_plan(
        replace(found, rules=(large,)), console=Console(file=(out := io.StringIO()), width=200)
    )
    [row] = [line for line in out.getvalue().splitlines() if line.startswith("BPTT")]
    assert row.split()[-2:] == ["12,346", "0.00123"]
    assert (
        "; kWh: the cards' rated watts all the time, hosts left out. Hours are of training, without"
        in basis(found)
    )


def test_a_small_card_takes_smaller_micro_batches_and_a_tiny_one_refuses() -> None:
    whole = of(on(1), "BPTT")
    small = replace(H100, memory=0.6 * whole.memory_bytes / 0.9)
    found = plan(made(), Cluster(workers=1, device=small), samples=6400, rules=RULES)
    assert (whole.micro_batch, whole.accumulation) == (64, 1)
    assert (
        of(found, "BPTT").micro_batch * of(found, "BPTT").accumulation == 64
        and of(found, "BPTT").accumulation > 1
    )
    assert of(found, "BPTT").memory_bytes < 0.6 * whole.memory_bytes
    tiny = replace(H100, memory=1000.0)
    refused = plan(made(), Cluster(workers=1, device=tiny), samples=6400, rules=RULES)
    assert refused.rules == () and advice(refused) == "No rule fits."
    assert refused.refused["BPTT"].startswith("BPTT: a worker must fit into 9e-07 GB; it needs")


def test_every_worker_here_takes_a_card_or_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.forecast.plan.free_bytes", lambda device: 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    on_cores = _Planner(made(), Cluster(workers=2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    on_cards = _Planner(made(), Cluster(workers=2))
    assert on_cores.memory == pytest.approx((1 - RESERVE) * 10**9 / 2)
    assert on_cards.memory == pytest.approx((1 - RESERVE) * 10**9)
    said = (
        "every worker takes a card, of which machines like this one have 2; got 4 workers; name the"
        " card with --device"
    )
    with pytest.raises(ValueError, match=said):
        plan(made(), Cluster(workers=4))


@pytest.mark.parametrize(
    ("flops", "sizes"), [(LIMIT["cpu"] / 8, (2, 8)), (1.0, (16, 64)), (1e15, (1,))]
)
def test_small_batches_are_timed(flops: float, sizes: tuple[int, ...]) -> None:
    """The larger one within a number of operations, and never above the micro-batch."""
    planner = _Planner(made(), Cluster(workers=1))
    fit = planner.fit(spec(SLTT))
    heavy = replace(fit.counts, traffic=Traffic([Operation(int(64 * flops), 0)]))
    assert planner._timed_sizes([replace(fit, counts=heavy)])[0] == sizes


def test_seconds_grow_linearly_with_the_batch() -> None:
    assert _at(64, (2, 8), (1.0, 4.0)) == pytest.approx(32)
    assert _at(2, (2, 8), (1.0, 4.0)) == pytest.approx(1)
    assert _at(64, (2, 8), (4.0, 3.0)) == 3  # noise makes no batch faster than a smaller one
    assert _at(64, (1,), (2.0,)) == 128


def test_sums_here_grow_with_the_bytes_that_are_moved() -> None:
    """At ZeRO-2 each of two micro-batches sums the gradients."""
    planner = _Planner(made(zero=2), Cluster(workers=2))
    fit = replace(planner.fit(spec(BPTT)), micro_batch=16, accumulation=2, sums=2)
    of = dict.fromkeys(("forward", "backward", "loop", "optimizer"), 1.0) | {"communication": 3.0}
    seconds = planner._extrapolated(fit, (4, 16), (of, of), (0.0, 0.0))
    assert (seconds.compute, seconds.optimizer) == (6, 1)
    assert seconds.communication == pytest.approx(3 * (2 * 2 + 1) / (2 + 1))


def test_a_rule_that_cannot_be_timed_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one whose gradient is not finite; the other rules are planned."""

    def check(guard: AnomalyGuard) -> None:
        if guard.rule.label == "BPTT":
            raise SkipBatch("its loss is nan")

    monkeypatch.setattr(AnomalyGuard, "check", check)
    found = plan(replace(made(), backend="plain"), Cluster(workers=1), rules=RULES)
    assert [each.rule for each in found.rules] == ["SLTT"]
    assert found.refused == {"BPTT": "BPTT: cannot be timed; batch 0: its loss is nan"}


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_workers_here_are_timed_together() -> None:
    found = plan(made(), Cluster(workers=2), rules=())
    (planned,) = found.rules
    assert found.timed == (8, 32) and planned.micro_batch == 32
    assert min(planned.compute_s, planned.communication_s, planned.optimizer_s) > 0
    assert "by 2 workers at the same time" in basis(found)


def test_a_teacher_is_in_every_rules_time_and_bytes() -> None:
    """On a card its kernels are too small to be waited for: two micro-batches of as many launches
    each.
    """
    recipe = replace(taught(), backend="deepspeed")
    alone = replace(recipe, teacher=None, objective=spec(CrossEntropy))
    cluster = Cluster(workers=1, device=H100)
    found, without = (plan(each, cluster, samples=64, rules=RULES) for each in (recipe, alone))
    teacher, kernels = _teacher_of(recipe)
    assert (found.teacher, found.teacher_bytes) == (
        "test_efficientnet",
        teacher,
    ) and without.teacher is None
    for rule in ("BPTT", "SLTT", "SLTT-1"):
        taught_, untaught = of(found, rule), of(without, rule)
        assert (
            taught_.teacher_s == pytest.approx(2 * kernels * H100.launch)
            and untaught.teacher_s == 0
        )
        assert taught_.step_s == pytest.approx(untaught.step_s + taught_.teacher_s)
        assert taught_.memory_bytes == pytest.approx(untaught.memory_bytes + teacher)
    said = f"hold the teacher, test_efficientnet: {teacher / 1e6:.4g} MB of weights."
    assert basis(found).endswith(said) and "teacher" not in basis(without)
    print_plan(found, console=Console(file=(out := io.StringIO()), width=200))
    [head] = [line for line in out.getvalue().splitlines() if line.startswith("rule")]
    assert "compute ms  teacher ms" in head
    here = plan(recipe, Cluster(workers=1), rules=())
    assert of(here, "SLTT-1").teacher_s > 0


def _teacher_of(recipe: Recipe) -> tuple[int, int]:
    """Bytes of its weights, statistics and a head for 10 classes, and the kernels of an answer,
    counted by hand.
    """
    teacher = build_teacher(recipe.with_untrained_teacher(), recipe.data.build())
    x_B = torch.zeros(2, 1, 8, 8)
    teacher.head = nn.Linear(teacher.features(x_B).shape[-1], 10)
    with Traffic() as traffic:
        teacher(x_B)
    return (
        sum(
            each.numel() * each.element_size()
            for each in (*teacher.parameters(), *teacher.buffers())
        ),
        traffic.kernels,
    )


# ------------------------------------------------------------------------------------- command line


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(RECIPE)
    run = command(monkeypatch, capsys)
    words = ("--device", "h100", "--price", "2")
    code, out, err = run("plan", str(file), *words)
    assert (code, err) == (0, "")
    said = " ".join(out.split())
    assert "a model, not measured" in out and "Fastest" in out and "roofline at 40%" in said
    code, out, _ = run("plan", str(file), *words, "--format", "json")
    told = json.loads(out)
    assert {each["rule"] for each in told["rules"]} >= {"BPTT", "SLTT"} and told[
        "kind"
    ] == "a model, not measured"
    code, out, _ = run("plan", str(file))
    assert code == 0
    assert "batches of 2 and 8 that were trained on this machine (" in " ".join(out.split())


def test_of_several_recipes_each_network_is_planned_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(TWO_NETWORKS)
    monkeypatch.setattr("pipeline.forecast.bench.RULES", ())
    run = command(monkeypatch, capsys)
    code, out, err = run("plan", str(file), "--device", "h100")
    assert (code, err) == (0, "")
    assert "small, bptt: a model" in out and "wide: a model" in out and out.count("Fastest") == 2
    code, out, _ = run("plan", str(file), "--device", "h100", "--format", "json")
    rules = [
        (each["recipe"], [planned["rule"] for planned in each["rules"]]) for each in json.loads(out)
    ]
    assert rules == [("small, bptt", ["SLTT-2", "BPTT"]), ("wide", ["SLTT-2"])]
    code, _, err = run("plan", str(file), "--against", "one")
    assert (code, err) == (
        2,
        "plan: --against is one run, so the file must hold one recipe; got a suite\n",
    )


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_plan_at_full_size_takes_less_than_a_minute_of_one_core_and_no_data(
    tmp_path: Path,
) -> None:
    words = (
        "plan",
        "recipes/imagenet/nf_resnet34_sltt.py",
        "--workers",
        "64",
        "--device",
        "h100",
        "--format",
        "json",
    )
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *words], capture_output=True, text=True, check=True
    )
    after = os.times()
    assert (
        after.children_user + after.children_system - before.children_user - before.children_system
        < 60
    )
    told = json.loads(done.stdout)
    planned = {each["rule"]: each for each in told["rules"]}
    assert told["samples"] is None and done.stderr.count("counting a step of") == 10
    assert planned["SLTT"]["flops"] == planned["BPTT"]["flops"] == 512_475_856_896
    assert planned["SLTT"]["saved_bytes"] < planned["BPTT"]["saved_bytes"] / 4


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_plan_against_what_was_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, runs = tmp_path / "mine.py", tmp_path / "runs"
    file.write_text(RECIPE)
    (recipe,) = recipes_of(file)
    # 240 batches: one that the machine delays weighs little
    long = replace(recipe, epochs=30, evaluation=Evaluation(every=0))
    summary = train_inline(runs / "launched", long)
    assert summary is not None
    run = command(monkeypatch, capsys)
    words = ("plan", str(file), "--runs", str(runs), "--against", "launched")
    code, out, err = run(*words, "--format", "json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    off, [planned] = (
        told["against"],
        [each for each in told["rules"] if each["rule"] == summary["rule"]],
    )
    assert (
        off["rule"] == summary["rule"] and off["saved_bytes"]["planned"] == planned["saved_bytes"]
    )
    assert (
        off["saved_bytes"]["measured"] == summary["peak_saved_bytes"]
        and off["saved_bytes"]["error"] == 0
    )
    assert off["step_s"]["measured"] == pytest.approx(recipe.batch_size / summary["images_per_s"])
    assert off["step_s"]["error"] == pytest.approx(
        off["step_s"]["planned"] / off["step_s"]["measured"] - 1
    )
    assert 0.4 < off["step_s"]["planned"] / off["step_s"]["measured"] < 2.5
    assert "Against launched, SLTT-2: saved for backward" in " ".join(run(*words)[1].split())
    code, _, err = run(*words, "--set", "batch_size=16")
    assert (
        code == 2
        and err
        == "plan: --against must be a run of what is planned; launched differs: batch_size: 16"
        " and 8\n"
    )
    code, _, err = run(*words, "--set", "rule.rescale=False")  # another rule of the same label
    assert (
        code == 2 and "--against must be a run of what is planned; launched differs: rule." in err
    )
    written = runs / "launched" / "summary.json"
    [on], told = summary["trained_on"], json.loads(written.read_text())
    halved = {**on, "micro_batch": 4}
    for trained_on, said in (
        (
            [on, halved],
            (
                "plan: --against must be a run that changed nothing on the way; launched did:"
                " micro_batch: 8 and 4\n"
            ),
        ),
        (
            [halved],
            (
                "plan: --against must be a run of what is planned; launched differs: micro_batch: 8"
                " and 4\n"
            ),
        ),
    ):
        write_json(written, {**told, "trained_on": trained_on})
        code, out, err = run(*words)
        assert (code, out, err) == (2, "", said)
    write_json(
        written,
        {
            **told,
            "trained_on": [{**on, "own_cores": True, "hardware": {**on["hardware"], "cores": 1}}],
        },
    )
    code, out, err = run(*words)
    assert code == 0 and "It had cores of its own; runs on the others," in " ".join(out.split()), (
        err
    )
    write_json(
        written, {**told, "trained_on": [{**on, "hardware": {**on["hardware"], "cores": 99}}]}
    )
    code, _, err = run(*words)
    assert code == 2 and "launched differs: hardware.cores: " in err and " and 99" in err
    of_a_card = (*words, "--device")
    with_card = [{**on, "hardware": {**on["hardware"], "gpu": "NVIDIA H100 80GB HBM3"}}]
    write_json(written, {**told, "trained_on": [on]})
    code, _, err = run(*of_a_card, "h100")
    assert code == 2 and err.endswith(
        "launched differs: card: NVIDIA H100 80GB HBM3 and none\n"
    )  # it trained on cores
    write_json(written, {**told, "trained_on": with_card})
    code, out, err = run(*of_a_card, "h100", "--format", "json")
    assert code == 0, err
    assert json.loads(out)["against"]["saved_bytes"]["error"] == pytest.approx(
        off["saved_bytes"]["error"]
    )
    code, _, err = run(*of_a_card, "a100")
    assert code == 2 and err.endswith(
        "launched differs: card: NVIDIA A100-SXM4-80GB and NVIDIA H100 80GB HBM3\n"
    )
    write_json(written, {**told, "peak_saved_bytes": None})
    code, out, err = run(*words)
    assert (code, out) == (
        2,
        "",
    ) and "on one of which its saved bytes were counted; got launched" in err
    written.unlink()
    code, _, err = run(*words)
    assert code == 2 and "must be a run that has finished, of more than a few batches" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--device", "h1000"),
            "plan: --device must be here, h100, h200, a100, v100, rtx4090; got h1000",
        ),
        (
            ("--device", "v100", "--set", "precision=bf16"),
            "plan: V100 SXM2, 32 GB: precision must be fp32; got bf16",
        ),
        (
            ("--node-gbps", "100"),
            (
                "plan: --per-node and --node-gbps are of cards in nodes; what links machines like"
                " this one is measured"
            ),
        ),
    ],
)
def test_bad_use_ends_in_a_line(
    words: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(RECIPE)
    code, _, err = command(monkeypatch, capsys)("plan", str(file), *words)
    assert (code, err) == (2, said + "\n")
