"""Long names, paths and values in terminals of 80 and 120 columns: no word is broken or cut, and a
pipe has no width. tests/cli/test_80_columns.py runs each command.
"""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.launch.preflight import Finding, print_findings
from pipeline.report.compare import print_comparison
from pipeline.report.selection import print_runs
from tests.report.conftest import make_all

Print = Callable[[Console | None], None]

RULES = ("BPTT", "BPTT-recompute", "SLTT", "SLTT-1", "OTTT-A")
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


@pytest.mark.parametrize("width", [80, 120, None])
def test_no_word_of_findings_is_broken(
    width: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (
        "/shared/somebody/with/a/long/name/spiking/networks/runs-of-2026",
        "`mount -o remount,flock /shared/somebody`",
    )
    check(a_doctors_findings, whole, width, capsys)


@pytest.mark.parametrize("width", [80, 120, None])
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
