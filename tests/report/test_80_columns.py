"""What commands print in terminals of 60, 80 and 120 columns: no word is broken or cut, and a pipe
has no width.
"""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.core.printing import new_console
from pipeline.forecast.bench import Cost, TeacherCost
from pipeline.forecast.plan import DEVICES, Cluster, Plan, Planned
from pipeline.forecast.probe import Probe
from pipeline.forecast.sweep import Point, Sweep
from pipeline.launch.preflight import Finding, print_findings
from pipeline.measure.gradient_similarity import Fidelity
from pipeline.recipe.recipe import spec
from pipeline.report.claims import Claim, print_claims
from pipeline.report.compare import print_comparison
from pipeline.report.forecasts import print_plan, print_probe, print_sweep, show_recipe
from pipeline.report.selection import print_runs
from pipeline.rules.sltt import SLTT
from tests.helpers.small import small_recipe
from tests.report.conftest import make_all

Print = Callable[[Console | None], None]

RULES = ("BPTT", "BPTT-recompute", "SLTT", "SLTT-1", "OTTT-A")
LAYERS = ("stages.0.blocks.1.attn.qkv.conv", "stages.1.blocks.0.mlp.fc1.conv", "classifier")
HARDWARE = {"cpu": "AMD EPYC-Genoa Processor (with IBPB)", "cores": 2, "gpu": "none", "threads": 1}


def run_name(rule: str, seed: int = 0) -> str:
    """As a launch of several makes them."""
    return f"fashion-demo-{rule.lower()}-seed-{seed}-20261129-183438-d598"


@pytest.fixture
def study(make_run: Callable[..., Path], runs_dir: Path) -> Path:
    """Five rules and two seeds, with a run that is to be gone on with."""
    conditions = {
        "reset_gradient": "detached",
        "norm_over": "step",
        "precision": "bf16",
        "steps_per_forward": 1,
    }
    on = [{"world_size": 2, "micro_batch": 16, "hardware": HARDWARE}]
    for index, rule in enumerate(RULES):
        for seed in (0, 1):
            make_run(
                run_name(rule, seed),
                rule=rule,
                seed=seed,
                top1=0.8962 - 0.011 * index + 0.003 * seed,
                peak_saved_bytes=20_312_345 // (1 + index),
                state_bytes=6_287_000,
                steady_forward_s=0.0332,
                steady_backward_s=0.0276 / (1 + index + seed),
                wall_s=11_402.0 / (1 + index),
                conditions=conditions,
                trained_on=on,
                recipe={"time_steps": 6},
                inference={
                    "energy_j": 14.79e-6,
                    "measured_j": 2.113e-3,
                    "prices": "45 nm, fp32",
                    "samples": 10_000,
                },
            )
    make_all(
        make_run,
        {
            run_name("SLTT", 2): {"rule": "SLTT", "seed": 2, "end": None},
            run_name("OTTT-A", 2): {"rule": "OTTT-A", "seed": 2, "end": "diverged"},
        },
    )
    return runs_dir


def cost(rule: str, index: int) -> Cost:
    work = {"multiplications": 2.318e9 / (1 + index), "additions": 23.18e9 / (1 + index)}
    return Cost(
        rule=rule,
        peak_saved_bytes=1_222_000_000 // (1 + index),
        state_bytes=337_900_000,
        peak_memory_bytes=None,
        rule_bytes=844_800,
        forward_s=0.02341,
        backward_s=0.01587 * (1 + index),
        loop_s=0.0,
        operations={"forward": work, "error": work},
        not_counted=("aten::bilinear",),
    )


def a_probe(console: Console | None) -> None:
    costs = tuple(cost(rule, index) for index, rule in enumerate(RULES))
    cosines = {
        rule: dict.fromkeys(LAYERS, 0.9734 - 0.2 * index) for index, rule in enumerate(RULES[1:])
    }
    found = Probe(
        recipe="imagenet-qkformer-10-384-sltt-k1",
        samples=32,
        time_steps=4,
        costs=costs,
        rounds={each.rule: (each.compute_s,) * 3 for each in costs},
        teacher=TeacherCost(
            teacher="caformer_b36.sail_in22k_ft_in1k", bytes=395_000_000, seconds=0.31
        ),
        fidelity=Fidelity(dict.fromkeys(LAYERS, 0.15), cosines),
        refused={
            "DSR": (
                "DSR: every neuron must be a RateIF or RateLIF; got LIF at"
                " stages.0.blocks.1.attn.neuron"
            )
        },
        uncompared={},
        hardware=HARDWARE,
    )
    print_probe(found, console=console)


def a_sweep(console: Console | None) -> None:
    points = tuple(
        Point(
            time_steps=steps,
            cost=cost(rule, index),
            images_per_compute_s=1234.5,
            largest_batch=12_345,
            at_largest=cost(rule, index),
        )
        for index, rule in enumerate(RULES)
        for steps in (1, 4, 16)
    )
    found = Sweep(
        recipe="imagenet-qkformer-10-384-sltt-k1",
        samples=32,
        points=points,
        refused={
            "DSR": {
                1: (
                    "DSR: every neuron must be a RateIF or RateLIF; got LIF at"
                    " stages.0.blocks.1.attn.neuron"
                )
            }
        },
        memory_bytes=80_000_000_000,
        at_largest=True,
        teacher=TeacherCost(
            teacher="caformer_b36.sail_in22k_ft_in1k", bytes=395_000_000, seconds=0.31
        ),
        hardware=HARDWARE,
    )
    print_sweep(found, console=console)


def a_plan(console: Console | None) -> None:
    def planned(rule: str) -> Planned:
        seconds = {
            "compute_s": 0.1234,
            "teacher_s": 0.01234,
            "communication_s": 1.26e-6,
            "optimizer_s": 0.00141,
        }
        sizes = {
            "zero": 2,
            "micro_batch": 128,
            "accumulation": 16,
            "saved_bytes": 10**9,
            "memory_bytes": 66.54e9,
        }
        work = {
            "flops": 123 * 10**12,
            "moved_bytes": 10**12,
            "kernels": 12_345,
            "forecast_note": "",
        }
        return Planned(
            rule=rule,
            written={},
            **sizes,
            **work,
            **seconds,
            images_per_s=123_456.0,
            hours=1234.5,
            kwh=12_345.6,
            cost=98_765.4,
        )

    found = Plan(
        recipe="imagenet-qkformer-10-384-sltt-k1",
        cluster=Cluster(workers=64, device=DEVICES["h100"], price=3.0),
        device=DEVICES["h100"].name,
        timed=(),
        samples=1_281_167,
        teacher="caformer_b36.sail_in22k_ft_in1k",
        teacher_bytes=395_000_000,
        rules=tuple(map(planned, RULES)),
        refused={
            "DSR": (
                "DSR: every neuron must be a RateIF or RateLIF; got LIF at"
                " stages.0.blocks.1.attn.neuron"
            )
        },
    )
    print_plan(found, console=console)


def a_doctors_findings(console: Console | None) -> None:
    found = [
        Finding(
            "versions",
            "ok",
            "python 3.11.7, torch 2.13.0+cpu, ray 2.60.0, deepspeed 0.19.8, ffcv 1.0.2",
        ),
        Finding(
            "storage",
            "bad",
            "node-17.cluster.example.org could lock a file in"
            " /shared/somebody/with/a/long/name/spiking/networks/runs-of-2026 that the driver has"
            " locked",
            "two drivers could train one run at once: `mount -o remount,flock /shared/somebody` on"
            " every node",
        ),
    ]
    print_findings(found, console)


def a_recipe(console: Console | None) -> None:
    show_recipe(
        small_recipe(name=run_name("SLTT"), rule=spec(SLTT, k=1), backend="deepspeed"), 2, console
    )


def some_claims(console: Console | None) -> None:
    claims = [
        Claim(
            about=about,
            claim="share of BPTT's gradient through time, stages.0.blocks.1.attn.qkv.conv",
            published="about 70 % less memory and 50 % less time than BPTT on ImageNet",
            bound="<= 0.523 (r = 1.38)",
            ours=(
                "0.573 (0.512 to 0.634) of BPTT-chunk-1's, seeds 0, 1, 2; SLTT-1 diverged in seed 3"
            ),
            holds=False,
        )
        for about in ("SLTT", "SLTT", "SLTT-1, ImageNet")
    ]
    print_claims(claims, console or new_console())


PRINTS: dict[str, Print] = {
    "probe": a_probe,
    "sweep": a_sweep,
    "plan": a_plan,
    "doctor": a_doctors_findings,
    "show": a_recipe,
    "claims": some_claims,
}
# what stays in one piece
WHOLE: dict[str, tuple[str, ...]] = {
    "probe": ("imagenet-qkformer-10-384-sltt-k1", "BPTT-recompute", *LAYERS, "mult/sample"),
    "sweep": ("imagenet-qkformer-10-384-sltt-k1", "BPTT-recompute", "12,345", "images/s"),
    "plan": (
        "imagenet-qkformer-10-384-sltt-k1",
        "BPTT-recompute",
        "128 x 16",
        "66.5 GB",
        "123,456",
        "98,765",
    ),
    "doctor": (
        "/shared/somebody/with/a/long/name/spiking/networks/runs-of-2026",
        "`mount -o remount,flock /shared/somebody`",
    ),
    "show": (run_name("SLTT"), "pipeline.rules.sltt.SLTT", '"gradient_accumulation_steps"'),
    "claims": ("stages.0.blocks.1.attn.qkv.conv", "SLTT-1, ImageNet"),
}


def check(
    act: Print, whole: tuple[str, ...], width: int | None, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """`width`: None for a pipe."""
    act(None)
    piped = capsys.readouterr().out
    printed = piped
    if width is not None:
        act(
            Console(
                file=(out := io.StringIO()), width=width, force_terminal=True, color_system=None
            )
        )
        printed = out.getvalue()
    assert "…" not in printed
    assert set(printed.split()) == set(piped.split()), (
        "a word that a pipe does not show is a part of one"
    )
    assert not [each for each in whole if each not in printed]
    lines = printed.splitlines()
    too_long = [line for line in lines if width is not None and len(line) > width]
    assert all(len(line.split()) == 1 or line in whole for line in too_long), too_long
    return lines


@pytest.mark.parametrize("width", [60, 80, 120, None])
@pytest.mark.parametrize("name", PRINTS)
def test_no_word_is_broken(
    name: str, width: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    check(PRINTS[name], WHOLE[name], width, capsys)


@pytest.mark.parametrize("width", [60, 80, 120, None])
def test_no_word_of_results_is_broken(
    width: int | None, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume = f"spiketrain resume {run_name('SLTT', 2)} --runs {study}"
    names = (*(run_name(rule, seed) for rule in RULES for seed in (0, 1)), resume)
    lines = check(lambda console: print_runs(study, console), names, width, capsys)
    assert resume in lines and all(
        any(line.split()[:1] == [name] for line in lines) for name in names[:-1]
    )
    lines = check(
        lambda console: print_comparison(study, console=console),
        (*RULES, "inference", resume),
        width,
        capsys,
    )
    if width is None:
        [row] = [line for line in lines if line.startswith("BPTT-recompute (2 runs)  88.67%")]
        assert row.count("×") == 8 and "± 0.21%" in row
