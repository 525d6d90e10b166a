"""What `spiketrain show`, `probe`, `sweep` and `plan` print of a recipe before it is trained."""

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from pipeline.core.printing import Column, new_console, number, print_fields, print_table, say
from pipeline.core.units import counted
from pipeline.data.base import DataError
from pipeline.forecast.bench import RESERVE, Cost
from pipeline.forecast.plan import Plan
from pipeline.forecast.probe import Measured, Probe
from pipeline.forecast.probe import advice as probe_advice
from pipeline.forecast.step_counts import describe_steps
from pipeline.forecast.sweep import Sweep
from pipeline.measure.memory import format_hardware
from pipeline.recipe import BASELINE, is_baseline
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.suite import Suite, references, refuse_references
from pipeline.report.compare import finite
from pipeline.report.rule_comparison import Comparison
from pipeline.report.titles import shared_fields
from pipeline.train.backend.deepspeed import config
from pipeline.train.build import check_recipe, with_placeholder_weights
from pipeline.train.tasks import fingerprint_of
from pipeline.train.weights import study_inputs

_ESTIMATED = "estimated, not measured"
_RULE = Column("rule")
_LOWEST_COSINE = Column("lowest cosine", align_right=True, wraps=True)
Row = dict[str | Column, str]  # cell texts by column; a column given as text contains numbers


def show_recipe(made: Recipe | Suite, workers: int, console: Console | None = None) -> None:
    """Print a recipe's fields, size, study key, cost of a step and DeepSpeed settings.

    For a suite, values that all recipes share are printed once, and then the other values of each
    recipe. Neither the data files nor the weights of referenced runs are needed: the step is
    counted without running it.
    """
    console = console or new_console()
    if isinstance(made, Recipe):
        refuse_references(made)
        made = Suite((made,))
    with with_placeholder_weights(made) as loadable_recipes:
        step_costs = describe_steps(loadable_recipes, workers)
        described = [
            (recipe.flat(), _derived(recipe, loadable, workers, step_cost))
            for recipe, loadable, step_cost in zip(
                made.recipes, loadable_recipes, step_costs, strict=True
            )
        ]
    same_fields, same_lines = map(shared_fields, zip(*described, strict=True))
    if len(described) > 1:
        _print_recipe(f"shared by {len(described)} recipes", same_fields, same_lines, console)
    for recipe, (fields, lines) in zip(made.recipes, described, strict=True):
        if len(described) > 1:
            console.print()
            fields = {key: text for key, text in fields.items() if key not in same_fields}
            lines = {key: text for key, text in lines.items() if key not in same_lines}
        _print_recipe(recipe.name, fields, lines, console)


def _derived(recipe: Recipe, loadable: Recipe, workers: int, step_cost: str) -> dict[str, str]:
    """The values that follow from a recipe.

    Args:
        loadable: the recipe with placeholder weights in place of references to runs.
        step_cost: the description of one step's cost.
    """
    network = check_recipe(loadable.with_untrained_teacher(), workers)  # may download weights
    split = recipe.split(workers)
    parameters = sum(p.numel() for p in network.parameters())
    try:
        if names := references(recipe):
            study = f"depends on the trained weights of {', '.join(names)}"
        else:
            study = recipe.study_key(study_inputs(recipe, fingerprint_of(recipe)))
    except DataError as error:
        study = f"depends on the content of the data set, which is not on this machine ({error})"
    lines = {
        "parameters": f"{parameters:,}",
        "study key": study,
        "global batch": (
            f"{recipe.batch_size} = {counted(workers, 'worker')} x"
            f" {counted(split.micro_batch, 'sample')} x"
            f" {counted(split.accumulation, 'accumulation step')}"
        ),
        "one step": step_cost,
    }
    if isinstance(rate := recipe.optimizer.kwargs.get("lr"), float):
        lines["learning rate"] = (
            f"{rate:g}; scaled linearly to a batch of 256 samples:"
            f" {rate * 256 / recipe.batch_size:g}"
        )
    if recipe.backend == "deepspeed":
        lines["DeepSpeed"] = json.dumps(
            config(
                micro_batch=split.micro_batch,
                workers=workers,
                parameters=parameters,
                zero=recipe.zero,
                precision=recipe.precision,
                clip_norm=recipe.clip_norm,
            ),
            indent=2,
        )
    return lines


def _print_recipe(
    title: str, fields: Mapping[str, str], lines: Mapping[str, str], console: Console
) -> None:
    say(console, title, style="italic")
    print_fields(console, fields)
    for name, text in lines.items():
        if "\n" in text:  # indented JSON
            console.out(f"{name:<13} {text}", highlight=False)
        else:
            say(console, text, label=f"{name:<13} ")


# ------------------------------------------------------------------------------- probe and sweep


def print_probe(probe: Probe, *, console: Console | None = None) -> None:
    """Print each rule's costs, its cosine with BPTT's gradient by layer, and the advice.

    Notes name each rule that cannot train the network or has no cosine, with the reason.
    """
    base = probe.cost(BASELINE)
    unknown = sorted({name for cost in probe.costs for name in cost.not_counted})
    notes = [f"mult and add exclude operators without a known count: {', '.join(unknown)}"]
    teacher = [] if probe.teacher is None else [probe.teacher.describe()]
    _print_measured(
        probe,
        probe.recipe,
        lambda cost: {
            "mult/sample": _with_ratio(cost, base, "multiplications", "M", 1e6),
            "add/sample": _with_ratio(cost, base, "additions", "M", 1e6),
            _LOWEST_COSINE: _lowest_cosine(probe, cost),
        },
        [*(notes if unknown else []), *teacher],
        console or new_console(),
    )


def comparison_text(found: Comparison) -> str:
    """The costs of each rule, its cosines with BPTT's gradient, and the advice, in 80 columns."""
    gigabytes = (found.memory or 0) / 1e9
    note = (
        f"largest batch: estimated from the memory of two batches, for {gigabytes:.3g} GB, of which"
        f" {RESERVE:.0%} is left free; without an optimizer's state"
    )
    console = Console(file=(text := io.StringIO()), width=80)
    _print_measured(
        found,
        found.network,
        lambda cost: {
            "largest batch": f"{found.largest_batch[cost.rule]:,}" if found.largest_batch else "",
            _LOWEST_COSINE: _lowest_cosine(found, cost),
        },
        [note] if found.largest_batch else [],
        console,
    )
    return text.getvalue().rstrip()


def _print_measured(
    measured: Measured,
    title: str,
    cells: Callable[[Cost], Row],
    notes: Sequence[str],
    console: Console,
) -> None:
    fidelity, base, fastest = measured.fidelity, measured.cost(BASELINE), measured.time_baseline
    rows: list[Row] = [
        {
            _RULE: cost.rule,
            "saved": _with_ratio(cost, base, "peak_saved_bytes", "MB", 1e6),
            **_state_cells(cost),
            "forward": _with_ratio(cost, fastest, "forward_s", "ms", 1e-3),
            "backward": _with_ratio(cost, fastest, "backward_s", "ms", 1e-3),
            **cells(cost),
        }
        for cost in measured.costs
    ]
    _print_rows(console, rows, title=title)
    if fidelity is not None:
        console.print()
        share = {"temporal share": fidelity.temporal_share} if fidelity.temporal_share else {}
        cosines = {rule: each for rule, each in fidelity.cosines.items() if not is_baseline(rule)}
        layer_rows: list[Row] = [
            {
                Column("layer"): layer,
                **{
                    name: _cosine_text(by_layer[layer])
                    for name, by_layer in {**share, **cosines}.items()
                },
            }
            for layer in fidelity.layers
            if cosines
        ]
        _print_rows(console, layer_rows, title="cosine with BPTT's gradient")
    console.print()
    _say_refused(console, measured.refused)
    for reason in measured.uncompared.values():
        say(console, f"not compared: {reason}")
    if fastest is not None:
        say(
            console,
            f"×: seconds relative to {fastest.rule}, the faster of {BASELINE} folded over time and"
            f" in slices of time, all else relative to {BASELINE}",
        )
    for note in notes:
        say(console, note)
    say(
        console,
        f"measured on one batch of {counted(measured.samples, 'sample')}, T ="
        f" {measured.time_steps}, before training; {format_hardware(measured.hardware)}",
    )
    say(console, probe_advice(measured))


def _say_refused(console: Console, refused: Mapping[str, str]) -> None:
    """Print the reasons why rules are not in the tables, each once."""
    rules: dict[str, list[str]] = {}
    for rule, reason in refused.items():
        rules.setdefault(reason.removeprefix(f"{rule}: "), []).append(rule)
    if rules:
        say(console, "not in the tables:")
    for reason, names in rules.items():
        say(console, f"{', '.join(names)}: {reason}", label="- ")


def _lowest_cosine(measured: Measured, cost: Cost) -> str:
    fidelity = measured.fidelity
    if fidelity is None or cost.rule not in fidelity.cosines or is_baseline(cost.rule):
        return ""
    layer, cosine = fidelity.lowest(cost.rule)
    return f"{_cosine_text(cosine)} {layer}".rstrip()


def _cosine_text(cosine: float) -> str:
    return "-" if math.isnan(cosine) else f"{cosine:.2f}"


def probe_to_json(probe: Probe) -> dict[str, Any]:
    fastest = probe.time_baseline
    return finite(
        {
            **asdict(probe),
            "time_baseline": None if fastest is None else fastest.rule,
            "advice": probe_advice(probe),
        }
    )


def _with_ratio(cost: Cost, base: Cost | None, name: str, unit: str, scale: float) -> str:
    value = getattr(cost, name)
    base_value = 0.0 if base is None else getattr(base, name)
    ratio = f"\t×{value / base_value:.2f}" if base_value else ""
    return f"{value / scale:.4g} {unit}{ratio}"


def _state_cells(cost: Cost) -> dict[str, str]:
    return {
        "states": f"{cost.state_bytes / 1e6:.4g} MB",
        "rule's tensors": f"{cost.rule_bytes / 1e6:.4g} MB" if cost.rule_bytes else "",
    }


def _print_rows(console: Console, rows: Sequence[Row], *, title: str, keys: int = 1) -> None:
    """Print rows as a table. A column without any text is left out."""
    shown = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    if shown:
        heads = [number(name) if isinstance(name, str) else name for name in shown]
        cells = ([row[name] for name in shown] for row in rows)
        print_table(console, heads, cells, title=title, keys=keys)


def print_sweep(sweep: Sweep, *, console: Console | None = None) -> None:
    console = console or new_console()
    base = {point.time_steps: point.cost for point in sweep.of(BASELINE)}
    fastest = sweep.time_baselines
    rows: list[Row] = []
    for rule in sweep.rules:
        for point in sweep.of(rule):
            cost, T, largest = point.cost, point.time_steps, point.at_largest
            about = "about " if point.largest_batch and largest is None else ""
            rows.append(
                {
                    _RULE: rule,
                    "T": str(T),
                    "saved": f"{cost.peak_saved_bytes / 1e6:.4g} MB",
                    f"saved / {BASELINE}": (
                        f"{cost.peak_saved_bytes / base[T].peak_saved_bytes:.2f}"
                        if T in base
                        else ""
                    ),
                    **_state_cells(cost),
                    "fwd+bwd ms": f"{cost.compute_s * 1e3:.4g}",
                    f"time / {BASELINE}": (
                        f"{cost.compute_s / fastest[T].compute_s:.2f}" if T in fastest else ""
                    ),
                    "images/s": f"{sweep.samples / cost.compute_s:.4g}",
                    "largest batch": (
                        "" if point.largest_batch is None else f"{about}{point.largest_batch:,}"
                    ),
                    "images/s at largest": (
                        f"{point.largest_batch / largest.compute_s:.4g}"
                        if point.largest_batch and largest
                        else ""
                    ),
                }
            )
    _print_rows(console, rows, title=sweep.recipe, keys=2)
    for note in _sweep_notes(sweep):
        say(console, note)


def _sweep_notes(sweep: Sweep) -> Iterator[str]:
    for rule in sweep.rules:
        first, *others = (point.time_steps for point in sweep.of(rule))
        if others:
            yield (
                f"{rule}: {sweep.growth(rule):.2f} times as many saved bytes at T = {others[-1]}"
                f" as at T = {first}"
            )
    fastest: dict[str, list[str]] = {}
    for T, cost in sweep.time_baselines.items():
        fastest.setdefault(cost.rule, []).append(str(T))
    if fastest:
        bases = ", ".join(f"{rule} at T = {', '.join(steps)}" for rule, steps in fastest.items())
        yield f"time / {BASELINE}: fwd+bwd relative to the faster {BASELINE}, which is {bases}"
    measured = {(point.cost.rule, point.time_steps) for point in sweep.points}
    refusals: dict[str, None] = {}  # each once
    for rule, reasons in sweep.refused.items():
        for T, reason in reasons.items():
            refusal = f"not in the table: {reason}"
            if (rule, T) in measured:
                refusal = f"{rule}: its largest batch at T = {T} was not trained: {reason}"
            refusals[refusal] = None
    yield from refusals
    yield (
        f"measured on one batch of {counted(sweep.samples, 'sample')};"
        f" {format_hardware(sweep.hardware)}"
    )
    yield (
        "fwd+bwd and images/s: forward and backward only, without data loading, optimizer and"
        " collectives"
    )
    if sweep.memory_bytes is not None:
        yield (
            f"largest batch: the largest that training fits into {sweep.memory_bytes / 1e9:.3g} GB"
            " of memory; evaluation, which holds a batch at every time step, is not included"
        )
        yield (
            '"about": estimated from the memory of two batches, with'
            f" {RESERVE:.0%} of the memory left free, and not trained"
        )
        if sweep.at_largest:
            yield 'without "about": trained, and fits; 0: one sample does not fit'
    if sweep.teacher is not None:
        yield sweep.teacher.describe()


# ------------------------------------------------------------------------------------------- plan


def print_plan(plan: Plan, *, console: Console | None = None) -> None:
    """Print one line per rule, the basis of the figures, and the fastest rule."""
    console = console or new_console()
    rows: list[Row] = []
    for planned in plan.rules:
        seconds = {
            "compute ms": planned.compute_s,
            **({} if plan.teacher is None else {"teacher ms": planned.teacher_s}),
            "comm. ms": planned.communication_s,
            "optimizer ms": planned.optimizer_s,
            "step ms": planned.step_s,
        }
        amounts = {
            "images/s": planned.images_per_s,
            "hours": planned.hours,
            "kWh": planned.kwh,
            "cost": planned.cost,
        }
        row: Row = {
            _RULE: planned.rule,
            "ZeRO": str(planned.zero),
            "micro x acc.": f"{planned.micro_batch} x {planned.accumulation}",
            "saved": f"{planned.saved_bytes / 1e6:,.4g} MB",
            "memory": f"{planned.memory_bytes / 1e9:.3g} GB",
            "TFLOP": f"{planned.flops / 1e12:.4g}",
            "kernels": f"{planned.kernels:,}",
        }
        row |= {title: f"{1e3 * value:.3g}" for title, value in seconds.items()}
        for title, value in amounts.items():
            if value is not None:
                row[title] = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        rows.append(row)
    _print_rows(console, rows, title=f"{plan.recipe}: {_ESTIMATED}")
    _say_refused(console, plan.refused)
    say(console, basis(plan))
    say(console, advice(plan))


def plan_to_json(plan: Plan) -> dict[str, Any]:
    return {
        "kind": _ESTIMATED,
        **asdict(plan),
        "basis": basis(plan),
        "advice": advice(plan),
    }


def basis(plan: Plan) -> str:
    """Name the sources of the figures, and the costs that they exclude."""
    cluster = plan.cluster
    card = cluster.device
    text = (
        "The columns saved, TFLOP and kernels are for one micro-batch. They are counted for a CPU"
        " at full size, without running the batch."
    )
    for planned in plan.rules:
        if planned.forecast_note:
            text += f" {planned.rule} is counted {planned.forecast_note}."
    text += (
        f" {card.name}: roofline model at {card.efficiency:.0%} ({card.source})."
        " Collectives (comm.) run at the bandwidth of the links, without latency:"
        f" {card.link / 1e9:.0f} GB/s between cards"
    )
    if cluster.workers > cluster.per_node:
        text += f", {cluster.node_link * 8 / 1e9:.0f} Gb/s between nodes"
    text += ". kWh assume the rated power of the cards all the time, without hosts."
    text += f" {RESERVE:.0%} of the memory is left free. No step waits for data."
    if plan.samples is None:
        text += " Hours need --samples, because the data set is not on this machine."
    else:
        text += " Hours cover training only, without evaluations and checkpoints."
    if plan.teacher is not None:
        text += (
            f" Time and memory include the teacher {plan.teacher} with"
            f" {plan.teacher_bytes / 1e6:.4g} MB of weights."
        )
    return text


def advice(plan: Plan) -> str:
    if not plan.rules:
        return "No rule fits."
    best = max(plan.rules, key=lambda planned: planned.images_per_s)
    smallest = min(plan.rules, key=lambda planned: planned.memory_bytes)
    text = (
        f"Fastest: {best.rule} with {counted(best.micro_batch, 'sample')} per micro-batch,"
        f" ZeRO-{best.zero}, {best.memory_bytes / 1e9:.3g} GB."
    )
    if smallest is not best:
        text += f" {smallest.rule} needs the least memory, {smallest.memory_bytes / 1e9:.3g} GB."
    return f"{text} Only training shows the accuracy of a rule."
