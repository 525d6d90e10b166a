"""Runs of a study by hand, with round numbers: two seeds of BPTT and of SLTT, as the journal and
the summary tell them.
"""

import math
from collections.abc import Sequence
from typing import Any

from pipeline.report.claims import Claim
from pipeline.report.results import Run, run_of
from pipeline.report.study import Group, Study
from tests.helpers.events import typed

KEY = "0123456789abcdef"
MACHINE = {
    "cpu": "a cpu",
    "cores": 2,
    "memory_gib": 24,
    "gpu": "none",
    "torch": "2.8",
    "threads": 1,
}
LAYERS = [
    {
        "name": "first",
        "neurons": 100,
        "samples": 20,
        "rates": [0.5, 0.25],
        "silent": 0.125,
        "saturated": 0.0,
    },
    {
        "name": "second",
        "neurons": 10,
        "samples": 20,
        "rates": [0.25, 0.0],
        "silent": 0.5,
        "saturated": 0.1,
    },
]
CLAIM = Claim(
    about="SLTT", claim="saved bytes", published="0.30", bound="<= 0.2", ours="0.25", holds=False
)
# Saved bytes, forward and backward seconds of 100 batches, joules of an inference
COSTS = {"BPTT": (8_000_000, 4.0, 12.0, 4e-6), "SLTT": (2_000_000, 4.0, 8.0, 3e-6)}


def on(*, workers: int = 1, micro_batch: int | None = None, **machine: Any) -> dict[str, Any]:
    """What a start trained on: batches of 8, whole unless told."""
    hardware = {**MACHINE, **machine}
    return {
        "world_size": workers,
        "micro_batch": 8 // workers if micro_batch is None else micro_batch,
        "hardware": hardware,
    }


def events(
    rule: str = "BPTT", *, seed: int = 0, top1: float = 0.9, restart: bool = False
) -> list[dict[str, Any]]:
    """Two epochs of 50 batches, a second for every 10; with a restart at batch 50, after 60 were
    done.
    """
    base = 1000.0
    start = {
        "event": "start",
        "run": "r",
        "rule": rule,
        "study": KEY,
        "seed": seed,
        **on(),
        "loader_threads": 1,
        "step": 0,
        "began": base - 2,
        "total_steps": 100,
        "steps_per_epoch": 50,
        "commit": "abc",
    }

    def step(count: int, at: float, attempt: int = 0) -> dict[str, Any]:
        metrics = {
            "loss": 2 - count / 100,
            "top1": count / 125,
            "images_per_s": 80.0,
            "forward_s": 0.04,
            "backward_s": 0.08,
        }
        return {
            "event": "step",
            "time": at,
            "attempt": attempt,
            "step": count,
            "epoch": count // 51,
            "metrics": metrics,
        }

    def evaluation(count: int, at: float, value: float, attempt: int = 0) -> dict[str, Any]:
        metrics = {"top1": value, "loss": 1.0, "firing_rate": 0.2}
        epoch = count // 50 - 1
        return {
            "event": "evaluation",
            "time": at,
            "attempt": attempt,
            "step": count,
            "epoch": epoch,
            "metrics": metrics,
        }

    found = [
        {**start, "time": base, "attempt": 0},
        step(25, base + 3),
        step(50, base + 6),
        evaluation(50, base + 7, top1 - 0.1),
    ]
    late, attempt = base + 8, 0
    if restart:
        found += [step(60, base + 8)]
        late, attempt = base + 1008, 1
        found += [
            {**start, "began": late - 1, "time": late, "attempt": 1, "step": 50, "commit": "def"}
        ]
    found += [
        step(75, late + 3, attempt),
        step(100, late + 6, attempt),
        evaluation(100, late + 7, top1, attempt),
    ]
    found += [{"event": "finish", "time": late + 8, "attempt": attempt, "step": 100}]
    return [typed(record).to_dict() for record in found]


def run(
    rule: str = "BPTT", *, seed: int = 0, top1: float = 0.9, restart: bool = False, **changes: Any
) -> Run:
    """A finished run; `changes` of its summary, and of the files beside it."""
    saved, forward, backward, energy = COSTS.get(rule, COSTS["SLTT"])
    beside = {
        name: changes.pop(name, value)
        for name, value in (("activity", LAYERS), ("recipe", recipe(rule)))
    }
    written = [
        *events(rule, seed=seed, top1=top1, restart=restart),
        *changes.pop("more_events", []),
    ]
    name, state = changes.pop("name", f"{rule.lower()}-{seed}"), changes.pop("state", "finished")
    summary = {
        "rule": rule,
        "seed": seed,
        "study": KEY,
        "world_size": 1,
        "loader_threads": 1,
        "steps": 100,
        "epochs": 2,
        "top1": top1,
        "peak_saved_bytes": saved,
        "state_bytes": 1000,
        "forward_s": forward,
        "backward_s": backward,
        "rest_s": 0.5,
        "evaluation_s": 2.0,
        "wall_s": 20.0 if rule == "BPTT" else 16.0,
        "images_per_s": 80.0,
        "startup_s": 0.0,
        "commit": "abc",
        "hardware": MACHINE,
        "inference": {
            "macs": 1.0,
            "acs": 2.0,
            "energy_j": energy,
            "prices": "45 nm, fp32",
            "samples": 10,
            "counted_on": "the first share",
        },
        **changes,
    }
    summary.setdefault(
        "trained_on", [{**on(workers=summary["world_size"]), "hardware": summary["hardware"]}]
    )
    for part in ("forward_s", "backward_s"):
        summary[f"steady_{part}"] = (
            None if summary[part] is None else summary[part] / summary["steps"]
        )
    return made(name, written, state=state, summary=summary, **beside)


def made(
    name: str,
    events: Sequence[dict[str, Any]],
    *,
    state: str,
    activity: list[Any] | None = None,
    **about: Any,
) -> Run:
    starts = [event for event in events if event["event"] == "start"]
    journal = list(map(typed, events))
    files: dict[str, Any] = {"journal": lambda: journal, "layers": lambda: activity}
    return run_of(name, starts=starts, state=state, **files, **about)


def recipe(rule: str = "BPTT", /, **changes: Any) -> dict[str, Any]:
    return {
        "name": rule.lower(),
        "model": {
            "target": "pipeline.models.x.net",
            "kwargs": {"neuron": {"target": "x.LIF", "kwargs": {"decay": 0.5}}},
        },
        "rule": {"target": f"pipeline.rules.x.{rule}", "kwargs": {}},
        "data": {"target": "pipeline.data.X", "kwargs": {"path": "/data"}},
        "optimizer": {"target": "timm.optim.create", "kwargs": {"lr": 0.1}},
        "time_steps": 2,
        "batch_size": 8,
        "precision": "fp32",
        "seed": 0,
        **changes,
    }


def study(*more: Run, **about: Any) -> Study:
    """BPTT 0.90 and 0.92, SLTT 0.89 and 0.90, and what else is given."""
    runs = (
        run(top1=0.9),
        run(seed=1, top1=0.92),
        run("SLTT", top1=0.89),
        run("SLTT", seed=1, top1=0.9),
    )
    return Study(**{"title": "by hand", "runs": (*runs, *more), **about})


def group_of(*runs: Run) -> Group:
    """The only group of these runs."""
    (found,) = Study(title="by hand", runs=runs).groups
    return found


def fidelity(rule: str = "SLTT") -> list[dict[str, Any]]:
    """At the start and after the first epoch; BPTT's gradient in the second layer is 0 at the
    start.
    """
    at_start = {
        "temporal_share": {"first": 0.5, "second": math.nan},
        "cosines": {rule: {"first": 0.875, "second": math.nan}},
    }
    later = {
        "temporal_share": {"first": 0.25, "second": 0.125},
        "cosines": {rule: {"first": 0.75, "second": 1.0}},
    }
    about = {"event": "fidelity", "time": 1000.5, "attempt": 0}
    return [
        {**about, "step": 0, "epoch": None, **at_start},
        {**about, "step": 50, "epoch": 0, **later},
    ]
