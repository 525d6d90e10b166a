"""Forecasts as tables: what `spiketrain probe`, `sweep` and `plan` print, and a plan's errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from pipeline.core.printing import Column, new_console, number, print_table, say
from pipeline.core.units import counted
from pipeline.forecast.bench import RESERVE, Cost
from pipeline.forecast.plan import Cluster, Plan
from pipeline.forecast.probe import Probe
from pipeline.forecast.probe import advice as probe_advice
from pipeline.forecast.sweep import Point, Sweep
from pipeline.measure.memory import format_hardware, hardware_differences
from pipeline.recipe import BASELINE
from pipeline.recipe.json import differing, listed
from pipeline.recipe.recipe import Recipe, Role, select
from pipeline.report.compare import finite
from pipeline.report.results import ReportError, Run, TrainedOn, read_run
from pipeline.report.selection import trained_apart

MODEL = "a model, not measured"
RULE = Column("rule")
T_ = TypeVar("T_")
Columns = Mapping[str | Column, Callable[[T_], str]]
"""functions that return a cell's text, by column title"""


def print_probe(found: Probe, *, console: Console | None = None) -> None:
    """Print each rule's costs, its cosine with BPTT's gradient by layer, and the advice.

    It also names the rules that cannot train the network or cannot be compared.
    """
    console = console or new_console()
    _print_costs(found, console)
    if found.fidelity is not None:
        console.print()
        _print_layers(found, console)
    console.print()
    for rule, why in found.refused.items():
        named = why if why.startswith(rule) else f"{rule}: {why}"
        say(console, f"not in the tables: {named}")
    for why in found.uncompared.values():
        say(console, f"not compared: {why}")
    if (fastest := found.time_baseline) is not None:
        over = f"bytes and operations over {BASELINE}'s, seconds over {fastest.rule}'s"
        say(console, f"×: {over}, the faster of {BASELINE} folded and in slices of time")
    if unknown := sorted({name for cost in found.costs for name in cost.not_counted}):
        say(console, f"mult and add leave out what no count knows: {', '.join(unknown)}")
    batch = f"one batch of {counted(found.samples, 'sample')}, T = {found.time_steps}"
    say(console, f"{batch}, before any training; {format_hardware(found.hardware)}")
    if found.teacher is not None:
        say(console, found.teacher.describe())
    say(console, probe_advice(found))


def probe_to_json(found: Probe) -> dict[str, Any]:
    fastest = found.time_baseline
    more = {"time_baseline": fastest and fastest.rule, "advice": probe_advice(found)}
    return finite({**asdict(found), **more})


def _print_costs(found: Probe, console: Console) -> None:
    def column(name: str, unit: str, scale: float) -> Callable[[Cost], str]:
        """Show a quantity beside its ratio to the baseline's."""
        base = found.time_baseline if name.endswith("_s") else found.cost(BASELINE)
        base_value = 0.0 if base is None else getattr(base, name)

        def cell(cost: Cost) -> str:
            value = getattr(cost, name)
            return f"{value / scale:.4g} {unit}" + (
                f"\t×{value / base_value:.2f}" if base_value else ""
            )

        return cell

    def least(cost: Cost) -> str:
        if found.fidelity is None or cost.rule not in found.fidelity.cosines:
            return ""
        layer, cosine = found.fidelity.lowest(cost.rule)
        return "-" if math.isnan(cosine) else f"{cosine:.2f} {layer}"

    columns: dict[str | Column, Callable[[Cost], str]] = {
        RULE: lambda cost: cost.rule,
        "saved": column("peak_saved_bytes", "MB", 1e6),
        "states beside": lambda cost: _megabytes(cost.state_bytes),
        **_own_bytes(found.costs, lambda cost: cost),
        "forward": column("forward_s", "ms", 1e-3),
        "backward": column("backward_s", "ms", 1e-3),
        "mult/sample": column("multiplications", "M", 1e6),
        "add/sample": column("additions", "M", 1e6),
        Column("least cosine", is_right=True, wraps=True): least,
    }
    _print_columns(console, found.costs, columns, title=found.recipe)


def _print_layers(found: Probe, console: Console) -> None:
    assert found.fidelity is not None
    share, cosines = found.fidelity.temporal_share, found.fidelity.cosines
    shown = {**({"temporal share": share} if share else {}), **cosines}
    rows = [
        (
            layer,
            *(
                "-" if math.isnan(by_layer[layer]) else f"{by_layer[layer]:.2f}"
                for by_layer in shown.values()
            ),
        )
        for layer in next(iter(cosines.values()), {})
    ]
    title = "cosine with BPTT's gradient"
    print_table(console, ("layer", *map(number, shown)), rows, title=title)


def print_sweep(found: Sweep, *, console: Console | None = None) -> None:
    """Print bytes, time and largest batch against T, and each rule's growth in bytes."""
    console = console or new_console()
    base = {point.time_steps: point.cost for point in found.of(BASELINE)}
    fastest = found.time_baselines

    def over(costs: Mapping[int, Cost], name: str) -> Callable[[Point], str]:
        def cell(point: Point) -> str:
            if (cost := costs.get(point.time_steps)) is None:
                return ""
            return f"{getattr(point.cost, name) / getattr(cost, name):.2f}"

        return cell

    columns: dict[str | Column, Callable[[Point], str]] = {
        RULE: lambda point: point.cost.rule,
        "T": lambda point: str(point.time_steps),
        "saved": lambda point: _megabytes(point.cost.peak_saved_bytes),
        f"× {BASELINE}": over(base, "peak_saved_bytes"),
        "states beside": lambda point: _megabytes(point.cost.state_bytes),
        **_own_bytes(found.points, lambda point: point.cost),
        "fwd+bwd ms": lambda point: f"{point.cost.compute_s * 1e3:.4g}",
        f"× faster {BASELINE}": over(fastest, "compute_s"),
        "images/s of fwd+bwd": lambda point: f"{point.images_per_compute_s:.4g}",
    }
    if found.memory_bytes is not None:
        columns["largest batch"] = _largest
    if found.memory_bytes is not None and found.at_largest:
        columns["images/s of its fwd+bwd"] = _speed_at_largest
    points = [point for rule in found.rules for point in found.of(rule)]
    _print_columns(console, points, columns, title=found.recipe, keys=2)
    for line in _below_a_sweep(found):
        say(console, line)


def _below_a_sweep(found: Sweep) -> Iterator[str]:
    for rule in found.rules:
        points = found.of(rule)
        if len(points) > 1:
            first, last = points[0].time_steps, points[-1].time_steps
            growth = f"{found.growth(rule):.2f} times the bytes"
            yield f"{rule}: {growth} at T = {last} as at T = {first}"
    fastest: dict[str, list[str]] = {}
    for T, cost in found.time_baselines.items():
        fastest.setdefault(cost.rule, []).append(str(T))
    if fastest:
        whose = ", ".join(f"{rule}'s at T = {', '.join(steps)}" for rule, steps in fastest.items())
        yield f"×: bytes over {BASELINE}'s, fwd+bwd over {whose}"
    yield from dict.fromkeys(_refusals(found))
    meaning = "fwd+bwd: forward and backward alone, without loading, optimizer and collectives"
    on = format_hardware(found.hardware)
    yield f"one batch of {counted(found.samples, 'sample')}; {meaning}; {on}"
    if found.memory_bytes is not None:
        estimate = (
            f"an estimate from what two batches took, {RESERVE:.0%} of the memory left free, not"
            " trained"
        )
        trained = '; without "about": trained, and fitted, or 0 where not even one sample did'
        how = f"{trained}; with it: {estimate}" if found.at_largest else f"; about: {estimate}"
        yield (
            f"largest batch in {found.memory_bytes / 1e9:.3g} GB{how}; of training alone: an"
            " evaluation holds a batch at every time step, without a graph, and is not in it"
        )
    if found.teacher is not None:
        yield found.teacher.describe()


def _refusals(found: Sweep) -> Iterator[str]:
    """Name the rules that cannot train the network, or whose largest batch could not be tried."""
    there = {(point.cost.rule, point.time_steps) for point in found.points}
    for rule, at_T in found.refused.items():
        for T, why in at_T.items():
            untried = f"{rule}: its largest batch at T = {T} was not trained: {why}"
            yield untried if (rule, T) in there else f"not in the table: {why}"


def _largest(point: Point) -> str:
    is_estimate = point.largest_batch and point.at_largest is None
    return f"{'about ' if is_estimate else ''}{point.largest_batch:,}"


def _speed_at_largest(point: Point) -> str:
    speed = point.images_per_compute_s_at_largest
    return "" if speed is None else f"{speed:.4g}"


def print_plan(
    plan: Plan, *, against: Errors | None = None, console: Console | None = None
) -> None:
    """Print one line per rule, the basis of the figures, and the fastest rule.

    `against`: the errors of the plan beside a finished run.
    """
    console = console or new_console()
    seconds = {
        "compute ms": "compute_s",
        **({} if plan.teacher is None else {"teacher ms": "teacher_s"}),
        "sums ms": "communication_s",
        "optimizer ms": "optimizer_s",
        "step ms": "step_s",
    }
    amounts = {"images/s": "images_per_s", "hours": "hours", "kWh": "kwh", "cost": "cost"}
    columns: dict[str | Column, Callable[[Any], str]] = {
        RULE: lambda each: each.rule,
        "ZeRO": lambda each: str(each.zero),
        "micro x acc.": lambda each: f"{each.micro_batch} x {each.accumulation}",
        "saved": lambda each: f"{each.saved_bytes / 1e6:,.4g} MB",
        "memory": lambda each: f"{each.memory_bytes / 1e9:.3g} GB",
        "TFLOP": lambda each: f"{each.flops / 1e12:.4g}",
        "kernels": lambda each: f"{each.kernels:,}",
    }
    for title, name in seconds.items():
        columns[title] = lambda each, name=name: f"{1e3 * getattr(each, name):.3g}"
    for title, name in amounts.items():
        if any(getattr(each, name) is not None for each in plan.rules):
            columns[title] = lambda each, name=name: _amount(getattr(each, name))
    _print_columns(console, plan.rules, columns, title=f"{plan.recipe}: {MODEL}")
    for why in plan.refused.values():
        say(console, f"not in the table: {why}")
    say(console, basis(plan))
    say(console, advice(plan))
    if against is not None:
        say(console, against.describe())


def plan_to_json(plan: Plan, against: Errors | None = None) -> dict[str, Any]:
    more = {"basis": basis(plan), "advice": advice(plan)}
    return {"kind": MODEL, **asdict(plan), **more, "against": against and against.to_json()}


def basis(plan: Plan) -> str:
    """Name the sources of the figures, and the costs that they exclude."""
    cluster = plan.cluster
    card, workers = cluster.device, cluster.workers
    text = (
        "Saved bytes, operations and kernels (saved, TFLOP, kernels) are of one micro-batch,"
        " counted at full size without running it, as a CPU would compute them."
    )
    for planned in plan.rules:
        if planned.forecast_note:
            text += f" {planned.rule} is counted {planned.forecast_note}."
    left = f"{RESERVE:.0%} of the memory is left free"
    if card is None:
        sizes = " and ".join(map(str, plan.timed))
        together = f", by {workers} workers at the same time," if workers > 1 else ""
        text += (
            f" Seconds grow linearly with the batch from those of batches of {sizes} that were"
            f" trained{together} on this machine ({plan.device}); {left}; loaders keep up."
        )
    else:
        link = f", {cluster.node_link * 8 / 1e9:.0f} Gb/s from node to node"
        text += (
            f" {card.name}: roofline at {card.efficiency:.0%} ({card.source}); {left}; "
            f"{card.link / 1e9:.0f} GB/s from card to card{link * (workers > cluster.per_node)}; "
            "loaders keep up; sums at the bandwidth of links, without their latency; "
            "kWh: the cards' rated watts all the time, hosts left out."
        )
    if plan.samples is None:
        text += " Hours need --samples: the data are not here."
    else:
        text += " Hours are of training, without evaluations and checkpoints."
    if plan.teacher is not None:
        weights = f"{plan.teacher_bytes / 1e6:.4g} MB of weights"
        text += f" All figures of time and memory hold the teacher, {plan.teacher}: {weights}."
    return text


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


def _amount(value: float) -> str:
    """Format `12,345`; values below 100 have three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.4g} MB"


def _own_bytes(
    items: Iterable[T_], cost_of: Callable[[T_], Cost]
) -> dict[str, Callable[[T_], str]]:
    """Return the column of the rules' own bytes, if a rule has some."""
    if not any(cost_of(each).rule_bytes for each in items):
        return {}
    return {"rule's own": lambda each: _megabytes(cost_of(each).rule_bytes)}


def _print_columns(
    console: Console, items: Sequence[Any], columns: Columns[Any], *, title: str, keys: int = 1
) -> None:
    """Print a table with one row per item. Columns are numeric unless they are a `Column`."""
    heads = [number(each) if isinstance(each, str) else each for each in columns]
    rows = [[cell(each) for cell in columns.values()] for each in items]
    print_table(console, heads, rows, title=title, keys=keys)


@dataclass(frozen=True)
class Quantity:
    """A planned and a measured value."""

    planned: float
    measured: float

    @property
    def error(self) -> float:
        """Relative error: positive if the plan was too high."""
        return self.planned / self.measured - 1


@dataclass(frozen=True, kw_only=True)
class Errors:
    """The errors of one rule's plan."""

    run: str
    rule: str
    own_cores: bool
    """Whether the run had its own cores. Runs on the other cores are in no plan."""
    saved_bytes: Quantity
    step_s: Quantity
    """Over steady batches: not the first, and none with counted bytes or operations."""

    def describe(self) -> str:
        saved, step = self.saved_bytes, self.step_s
        return (
            f"Against {self.run}, {self.rule}: saved for backward {saved.planned / 1e6:.4g} MB"
            f" planned, {saved.measured / 1e6:.4g} MB measured, {saved.error:+.1%}; a step"
            f" {step.planned * 1e3:.4g} ms planned, {step.measured * 1e3:.4g} ms measured,"
            f" {step.error:+.1%}."
            + (
                " It had cores of its own; runs on the others, and the memory that they share, are"
                " in no plan." * self.own_cores
            )
        )

    def to_json(self) -> dict[str, Any]:
        quantities = {"saved_bytes": self.saved_bytes, "step_s": self.step_s}
        errors = {name: {**asdict(each), "error": each.error} for name, each in quantities.items()}
        return {**asdict(self), **errors}


def refuse_unless_comparable(recipe: Recipe, cluster: Cluster, folder: Path) -> None:
    """Refuse a run that a plan of `recipe` on `cluster` does not describe.

    Raises:
        ReportError: the run has not finished, or its recipe, machines or workers differ from the
            plan's, or changed during the run.
    """
    run, on = _measured(folder)
    differing_fields = [("workers", cluster.workers, on.world_size)]
    differing_fields = [each for each in differing_fields if each[1] != each[2]] + _other_machine(
        cluster, on
    )
    mine = recipe.resolved().to_json()["recipe"]
    differing_fields += list(
        differing(
            "",
            *(
                select(each, lambda role: Role.STUDY in role and Role.NO_STEP_COST not in role)
                for each in (mine, run.recipe)
            ),
        )
    )
    _refuse_if(differing_fields, folder)


def _other_machine(cluster: Cluster, on: TrainedOn) -> list[tuple[str, Any, Any]]:
    """List differences of the planned machine from the run's. A plan excludes the card's host."""
    there = on.hardware
    if cluster.device is not None:
        return list(differing("card", cluster.device.driver, there["gpu"]))
    differing_fields = [
        (f"hardware.{name}", *values)
        for name, *values in hardware_differences(there, own_cores=on.own_cores)
    ]
    if there["threads"] != cluster.threads:
        differing_fields.append(("cpus-per-worker", cluster.threads, there["threads"]))
    return differing_fields


def errors(found: Plan, folder: Path) -> Errors:
    """Return the errors of the plan for the rule that trained the run.

    Raises:
        ReportError: the plan lacks the rule, has another rule of the same label, or has another
            micro-batch than the run.
    """
    run, on = _measured(folder)
    planned = next((each for each in found.rules if each.rule == run.rule), None)
    if planned is None:
        rules = ", ".join(each.rule for each in found.rules) or "none"
        raise ReportError(
            f"plan: --against must be of a rule that is planned, {rules}; got {run.rule} of"
            f" {folder.name}"
        )
    of_rule = differing("rule", {**planned.written}, run.recipe["rule"])
    _refuse_if([*of_rule, *differing("micro_batch", planned.micro_batch, on.micro_batch)], folder)
    summary = run.summary or {}
    batch_size = planned.images_per_s * planned.step_s
    return Errors(
        run=folder.name,
        rule=planned.rule,
        saved_bytes=Quantity(planned.saved_bytes, summary["peak_saved_bytes"]),
        step_s=Quantity(planned.step_s, batch_size / summary["images_per_s"]),
        own_cores=on.own_cores,
    )


def _measured(folder: Path) -> tuple[Run, TrainedOn]:
    """Return the run and its training conditions, which must not change during the run."""
    run = read_run(folder)
    if not run.value("images_per_s") or not run.value("peak_saved_bytes"):
        raise ReportError(
            "plan: --against must be a run that has finished, of more than a few batches, on one"
            f" of which its saved bytes were counted; got {folder.name}"
        )
    first, *later = run.trained_on
    if later:
        changed = listed(list(trained_apart([asdict(first)], [asdict(each) for each in later])))
        raise ReportError(
            f"plan: --against must be a run that changed nothing on the way; {folder.name} did:"
            f" {changed}"
        )
    return run, first


def _refuse_if(differs: Sequence[tuple[str, Any, Any]], folder: Path) -> None:
    if differs:
        shown = "; ".join(f"{name}: {a} and {b}" for name, a, b in differs[:4])
        raise ReportError(
            f"plan: --against must be a run of what is planned; {folder.name} differs: {shown}"
        )
