"""A plan as a table, and which rule it would take."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console

from pipeline.core.printing import new_console, number, print_table, say
from pipeline.core.units import counted
from pipeline.forecast.bench import RESERVE
from pipeline.forecast.plan import Plan, Planned
from pipeline.forecast.profile import EFFICIENCY
from pipeline.report.planned import Errors

KIND = "a model, not measured"


def print_plan(
    found: Plan,
    *,
    against: Errors | None = None,
    as_json: bool = False,
    console: Console | None = None,
) -> None:
    """One line for each rule; what the figures rest on; the rule that takes the fewest hours; how
    far off a run was found.
    """
    console = console or new_console()
    if as_json:
        told = {
            "basis": basis(found),
            "advice": advice(found),
            "against": None if against is None else against.to_json(),
        }
        console.out(
            json.dumps({"kind": KIND, **asdict(found), **told}, indent=2, allow_nan=False),
            highlight=False,
        )
        return
    parts = (
        "compute",
        *(() if found.teacher is None else ("teacher",)),
        "sums",
        "optimizer",
        "loading",
        "step",
    )
    titles = [
        "ZeRO",
        "micro x acc.",
        "memory",
        *(f"{part} ms" for part in parts),
        "images/s",
        "hours",
    ]
    titles += [] if found.cluster.device is None else ["kWh"]
    titles += [] if found.cluster.price is None else ["cost"]
    rows = [_cells(planned, taught=found.teacher is not None) for planned in found.rules]
    print_table(console, ("rule", *map(number, titles)), rows, title=f"{found.recipe}: {KIND}")
    for why in found.refused.values():
        say(console, f"not in the table: {why}")
    say(console, basis(found))
    say(console, advice(found))
    if against is not None:
        say(console, against.told())


def basis(found: Plan) -> str:
    """What the figures were made from, and what is not in them, in a sentence or two."""
    told = (
        f"{_basis_of_rules(found)} Hours are of training, without evaluations, checkpoints and what"
        " workers agree on in between."
    )
    if found.teacher is None:
        return told
    weights = f"{found.teacher_bytes / 1e6:.4g} MB of weights"
    return (
        f"{told} In all figures the teacher, {found.teacher}: {weights}, asked about every sample."
    )


def _basis_of_rules(found: Plan) -> str:
    sizes, times = (" and ".join(map(str, each)) for each in found.profiled)
    profiled = (
        f"From batches of {sizes} samples at T = {times}"
        + ("" if found.source == "data" else ", made up,")
        + " on this machine"
    )
    card, workers = found.cluster.device, found.cluster.workers
    if card is None:
        left = f"{RESERVE:.0%} of the memory that is free left so"
        neighbours = "" if workers == 1 else f", and what {workers} local workers do to one another"
        return f"{profiled}, and their seconds{neighbours}; {left}."
    link = (
        ""
        if workers <= found.cluster.per_node
        else f", {found.cluster.node_link * 8 / 1e9:.0f} Gb/s from node to node"
    )
    return (
        f"{profiled}; {card.name}: roofline at {EFFICIENCY:.0%} ({card.source}), {RESERVE:.0%} of"
        f" its memory left free, {card.link / 1e9:.0f} GB/s from card to card{link}, loaders that"
        " keep up; sums at the bandwidth of links, without their latency; kWh: the cards' rated"
        " watts all the time, hosts left out."
    )


def advice(found: Plan) -> str:
    if not found.rules:
        return "No rule fits."
    best = min(found.rules, key=lambda planned: planned.hours)
    smallest = min(found.rules, key=lambda planned: planned.memory_bytes)
    other = (
        ""
        if smallest is best
        else f" {smallest.rule} needs the least memory, {smallest.memory_bytes / 1e9:.3g} GB."
    )
    return (
        f"Fewest hours: {best.rule}, {counted(best.micro_batch, 'sample')} on a worker at a time,"
        f" ZeRO-{best.zero}, {best.memory_bytes / 1e9:.3g} GB.{other} What a rule costs in"
        " accuracy, a run says."
    )


def _cells(planned: Planned, *, taught: bool) -> tuple[str, ...]:
    seconds = [
        planned.compute_s,
        *([planned.teacher_s] if taught else []),
        planned.communication_s,
        planned.optimizer_s,
    ]
    return (
        planned.rule,
        str(planned.zero),
        f"{planned.micro_batch} x {planned.accumulation}",
        f"{planned.memory_bytes / 1e9:.3g} GB",
        *(f"{1e3 * each:.3g}" for each in (*seconds, planned.loading_s, planned.step_s)),
        _amount(planned.images_per_s),
        f"{planned.hours:.3g}",
        *(() if planned.kwh is None else (_amount(planned.kwh),)),
        *(() if planned.cost is None else (_amount(planned.cost),)),
    )


def _amount(value: float) -> str:
    """`12,345`, and of less than 100 three digits: a small plan is not for nothing."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
