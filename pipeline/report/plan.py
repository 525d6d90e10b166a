"""A plan as a table, and which rule it would take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from pipeline.core.printing import new_console, number, print_table, say
from pipeline.core.units import counted
from pipeline.forecast.bench import RESERVE
from pipeline.forecast.plan import Plan, Planned
from pipeline.report.planned import Errors

KIND = "a model, not measured"


def print_plan(
    plan: Plan,
    *,
    against: Errors | None = None,
    as_json: bool = False,
    console: Console | None = None,
) -> None:
    """One line for each rule, what the figures rest on, and the fastest rule.

    `against`: how far off the plan is for a run.
    """
    console = console or new_console()
    if as_json:
        console.out(
            json.dumps(plan_as_json(plan, against), indent=2, allow_nan=False), highlight=False
        )
        return
    parts = (
        "compute",
        *(() if plan.teacher is None else ("teacher",)),
        "sums",
        "optimizer",
        "step",
    )
    titles = ["ZeRO", "micro x acc.", "saved", "memory", "TFLOP", "kernels"]
    titles += [*(f"{part} ms" for part in parts), "images/s"]
    titles += [title for title, value in _optional(plan.rules) if value]
    rows = [_cells(planned, plan) for planned in plan.rules]
    print_table(console, ("rule", *map(number, titles)), rows, title=f"{plan.recipe}: {KIND}")
    for why in plan.refused.values():
        say(console, f"not in the table: {why}")
    say(console, basis(plan))
    say(console, advice(plan))
    if against is not None:
        say(console, against.told())


def plan_as_json(plan: Plan, against: Errors | None = None) -> dict[str, Any]:
    more = {"basis": basis(plan), "advice": advice(plan)}
    compared = None if against is None else against.to_json()
    return {"kind": KIND, **asdict(plan), **more, "against": compared}


def basis(plan: Plan) -> str:
    """What the figures were made from, and what is not in them."""
    cluster = plan.cluster
    card, workers = cluster.device, cluster.workers
    said = (
        "Saved bytes, operations and kernels (saved, TFLOP, kernels) are of one micro-batch,"
        " counted at full size without running it, as a CPU would compute them."
    )
    for planned in plan.rules:
        if planned.forecast_note:
            said += f" {planned.rule} is counted {planned.forecast_note}."
    left = f"{RESERVE:.0%} of the memory is left free"
    if card is None:
        sizes = " and ".join(map(str, plan.timed))
        together = f", by {workers} workers at the same time," if workers > 1 else ""
        said += (
            f" Seconds grow linearly with the batch from those of batches of {sizes} that were"
            f" trained{together} on this machine ({plan.device}); {left}; loaders keep up."
        )
    else:
        link = f", {cluster.node_link * 8 / 1e9:.0f} Gb/s from node to node"
        said += (
            f" {card.name}: roofline at {card.efficiency:.0%} ({card.source}); {left}; "
            f"{card.link / 1e9:.0f} GB/s from card to card{link * (workers > cluster.per_node)}; "
            "loaders keep up; sums at the bandwidth of links, without their latency; "
            "kWh: the cards' rated watts all the time, hosts left out."
        )
    if plan.samples is None:
        said += " Hours need --samples: the data are not here."
    else:
        said += " Hours are of training, without evaluations and checkpoints."
    if plan.teacher is not None:
        weights = f"{plan.teacher_bytes / 1e6:.4g} MB of weights"
        said += f" All figures of time and memory hold the teacher, {plan.teacher}: {weights}."
    return said


def advice(plan: Plan) -> str:
    if not plan.rules:
        return "No rule fits."
    best = max(plan.rules, key=lambda planned: planned.images_per_s)
    smallest = min(plan.rules, key=lambda planned: planned.memory_bytes)
    other = ""
    if smallest is not best:
        other = f" {smallest.rule} needs the least memory, {smallest.memory_bytes / 1e9:.3g} GB."
    return (
        f"Fastest: {best.rule}, {counted(best.micro_batch, 'sample')} on a worker at a time, "
        f"ZeRO-{best.zero}, {best.memory_bytes / 1e9:.3g} GB.{other} "
        "What a rule costs in accuracy, a run says."
    )


def _optional(rules: Sequence[Planned]) -> list[tuple[str, bool]]:
    """Columns, and whether any rule has a figure for them."""
    values = {
        "hours": [each.hours for each in rules],
        "kWh": [each.kwh for each in rules],
        "cost": [each.cost for each in rules],
    }
    return [(title, any(value is not None for value in each)) for title, each in values.items()]


def _cells(planned: Planned, plan: Plan) -> tuple[str, ...]:
    teacher_s = () if plan.teacher is None else (planned.teacher_s,)
    seconds = (planned.compute_s, *teacher_s, planned.communication_s, planned.optimizer_s)
    more = (planned.hours, planned.kwh, planned.cost)
    return (
        planned.rule,
        str(planned.zero),
        f"{planned.micro_batch} x {planned.accumulation}",
        f"{planned.saved_bytes / 1e6:,.4g} MB",
        f"{planned.memory_bytes / 1e9:.3g} GB",
        f"{planned.flops / 1e12:.4g}",
        f"{planned.kernels:,}",
        *(f"{1e3 * each:.3g}" for each in (*seconds, planned.step_s)),
        *(_amount(each) for each in (planned.images_per_s, *more) if each is not None),
    )


def _amount(value: float) -> str:
    """`12,345`, and of less than 100 three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
