"""What `spiketrain show`, `probe`, `sweep` and `plan` print of a recipe before it is trained."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.core.printing import Column, new_console, number, print_fields, print_table, say
from pipeline.core.units import counted
from pipeline.data.base import DataError
from pipeline.forecast.bench import RESERVE, Cost
from pipeline.forecast.plan import Cluster, Plan
from pipeline.forecast.probe import Probe
from pipeline.forecast.probe import advice as probe_advice
from pipeline.forecast.step_counts import describe_steps
from pipeline.forecast.sweep import Sweep
from pipeline.measure.memory import format_hardware, hardware_differences
from pipeline.recipe import BASELINE
from pipeline.recipe.json import differing, listed
from pipeline.recipe.recipe import Recipe, Role, select
from pipeline.recipe.suite import Suite, references, refuse_references
from pipeline.report.compare import finite
from pipeline.report.results import ReportError, Run, read_run
from pipeline.report.selection import trained_apart
from pipeline.train.backend.deepspeed import config
from pipeline.train.build import check_recipe, with_placeholder_weights
from pipeline.train.tasks import fingerprint_of
from pipeline.train.weights import study_inputs

MODEL = "a model, not measured"
_RULE = Column("rule")
Row = dict[str | Column, str]  # the text of each column; a column named by text has numbers


def show_recipe(
    made: Recipe | Suite,
    workers: int,
    console: Console | None = None,
    *,
    counts_steps: bool = False,
) -> None:
    """Print a recipe's fields, parameters, study key, global batch and DeepSpeed settings.

    For a suite, the values that all recipes share are printed once, followed by the other values
    of each recipe. Neither data files nor the weights of a reference are needed.

    Args:
        counts_steps: also print the cost of one step of each recipe, counted without running it.
    """
    console = console or new_console()
    if isinstance(made, Recipe):
        refuse_references(made)
        made = Suite((made,))
    with with_placeholder_weights(made) as recipes:
        steps = describe_steps(recipes, workers) if counts_steps else [""] * len(recipes)
        resolved = [
            (recipe.flat(), _derived(recipe, ready, workers, step))
            for recipe, ready, step in zip(made.recipes, recipes, steps, strict=True)
        ]
    shared_fields, shared_lines = map(_shared, zip(*resolved, strict=True))
    if len(resolved) > 1:
        _print_recipe(f"shared by {len(resolved)} recipes", shared_fields, shared_lines, console)
    for recipe, (fields, lines) in zip(made.recipes, resolved, strict=True):
        if len(resolved) > 1:
            console.print()
            fields = {key: text for key, text in fields.items() if key not in shared_fields}
            lines = {key: text for key, text in lines.items() if key not in shared_lines}
        _print_recipe(recipe.name, fields, lines, console)


def _shared(found: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The entries that are equal in all of them."""
    first, *others = found
    return {
        name: text
        for name, text in first.items()
        if all(other.get(name) == text for other in others)
    }


def _derived(recipe: Recipe, ready: Recipe, workers: int, step: str) -> dict[str, str]:
    """The values that follow from a recipe.

    `ready` is the recipe with files in place of its references.
    """
    network = check_recipe(ready.with_untrained_teacher(), workers)  # may download weights
    split = recipe.split(workers)
    parameters = sum(p.numel() for p in network.parameters())
    try:
        if names := references(recipe):
            study = f"depends on what {', '.join(names)} will have learnt"
        else:
            study = recipe.study_key(study_inputs(recipe, fingerprint_of(recipe)))
    except DataError as error:
        study = f"depends on the data's content, which is not here yet ({error})"
    lines = {
        "parameters": f"{parameters:,}",
        "study key": study,
        "global batch": (
            f"{recipe.batch_size} = {counted(workers, 'worker')} x"
            f" {counted(split.micro_batch, 'sample')} x {split.accumulation} accumulated"
        ),
    }
    if step:
        lines["one step"] = step
    if isinstance(rate := recipe.optimizer.kwargs.get("lr"), float):
        lines["learning rate"] = (
            f"{rate:g} for this batch, {rate * 256 / recipe.batch_size:g} for one of 256 samples"
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


def print_probe(found: Probe, *, console: Console | None = None) -> None:
    """Print each rule's costs, its cosine with BPTT's gradient by layer, and the advice.

    It also names the rules that cannot train the network or cannot be compared.
    """
    console, fidelity = console or new_console(), found.fidelity
    base, fastest = found.cost(BASELINE), found.time_baseline
    rows: list[Row] = []
    for cost in found.costs:
        least = ""
        if fidelity is not None and cost.rule in fidelity.cosines:
            layer, cosine = fidelity.lowest(cost.rule)
            least = "-" if math.isnan(cosine) else f"{cosine:.2f} {layer}"
        rows.append(
            {
                _RULE: cost.rule,
                "saved": _over(cost, base, "peak_saved_bytes", "MB", 1e6),
                **_states(cost),
                "forward": _over(cost, fastest, "forward_s", "ms", 1e-3),
                "backward": _over(cost, fastest, "backward_s", "ms", 1e-3),
                "mult/sample": _over(cost, base, "multiplications", "M", 1e6),
                "add/sample": _over(cost, base, "additions", "M", 1e6),
                Column("least cosine", is_right=True, wraps=True): least,
            }
        )
    _print_rows(console, rows, title=found.recipe)
    if fidelity is not None:
        console.print()
        share = {"temporal share": fidelity.temporal_share} if fidelity.temporal_share else {}
        layers: list[Row] = [
            {
                Column("layer"): layer,
                **{
                    name: "-" if math.isnan(by_layer[layer]) else f"{by_layer[layer]:.2f}"
                    for name, by_layer in {**share, **fidelity.cosines}.items()
                },
            }
            for layer in next(iter(fidelity.cosines.values()), {})
        ]
        _print_rows(console, layers, title="cosine with BPTT's gradient")
    console.print()
    for rule, why in found.refused.items():
        say(console, f"not in the tables: {why if why.startswith(rule) else f'{rule}: {why}'}")
    for why in found.uncompared.values():
        say(console, f"not compared: {why}")
    if fastest is not None:
        say(
            console,
            f"×: bytes and operations over {BASELINE}'s, seconds over {fastest.rule}'s, the faster"
            f" of {BASELINE} folded and in slices of time",
        )
    if unknown := sorted({name for cost in found.costs for name in cost.not_counted}):
        say(console, f"mult and add leave out what no count knows: {', '.join(unknown)}")
    say(
        console,
        f"one batch of {counted(found.samples, 'sample')}, T = {found.time_steps}, before any"
        f" training; {format_hardware(found.hardware)}",
    )
    if found.teacher is not None:
        say(console, found.teacher.describe())
    say(console, probe_advice(found))


def probe_to_json(found: Probe) -> dict[str, Any]:
    fastest = found.time_baseline
    time_baseline = None if fastest is None else fastest.rule
    return finite({**asdict(found), "time_baseline": time_baseline, "advice": probe_advice(found)})


def _over(cost: Cost, base: Cost | None, name: str, unit: str, scale: float) -> str:
    value, of_base = getattr(cost, name), 0.0 if base is None else getattr(base, name)
    ratio = f"\t×{value / of_base:.2f}" if of_base else ""
    return f"{value / scale:.4g} {unit}{ratio}"


def _states(cost: Cost) -> dict[str, str]:
    """The bytes of states and of the rule itself."""
    own = f"{cost.rule_bytes / 1e6:.4g} MB" if cost.rule_bytes else ""
    return {"states beside": f"{cost.state_bytes / 1e6:.4g} MB", "rule's own": own}


def _print_rows(console: Console, rows: Sequence[Row], *, title: str, keys: int = 1) -> None:
    """Print rows as a table. A column without any text is left out."""
    shown = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    if shown:
        heads = [number(each) if isinstance(each, str) else each for each in shown]
        cells = ([row[name] for name in shown] for row in rows)
        print_table(console, heads, cells, title=title, keys=keys)


def print_sweep(found: Sweep, *, console: Console | None = None) -> None:
    """Print bytes, time and largest batch against T, and each rule's growth in bytes."""
    console = console or new_console()
    base = {point.time_steps: point.cost for point in found.of(BASELINE)}
    fastest = found.time_baselines
    rows: list[Row] = []
    for point in (point for rule in found.rules for point in found.of(rule)):
        cost, T, largest = point.cost, point.time_steps, point.at_largest
        about = "about " if point.largest_batch and largest is None else ""
        rows.append(
            {
                _RULE: cost.rule,
                "T": str(T),
                "saved": f"{cost.peak_saved_bytes / 1e6:.4g} MB",
                f"× {BASELINE}": (
                    f"{cost.peak_saved_bytes / base[T].peak_saved_bytes:.2f}" if T in base else ""
                ),
                **_states(cost),
                "fwd+bwd ms": f"{cost.compute_s * 1e3:.4g}",
                f"× faster {BASELINE}": (
                    f"{cost.compute_s / fastest[T].compute_s:.2f}" if T in fastest else ""
                ),
                "images/s of fwd+bwd": f"{found.samples / cost.compute_s:.4g}",
                "largest batch": (
                    "" if point.largest_batch is None else f"{about}{point.largest_batch:,}"
                ),
                "images/s of its fwd+bwd": (
                    f"{point.largest_batch / largest.compute_s:.4g}"
                    if point.largest_batch and largest
                    else ""
                ),
            }
        )
    _print_rows(console, rows, title=found.recipe, keys=2)
    for line in _below_a_sweep(found):
        say(console, line)


def _below_a_sweep(found: Sweep) -> Iterator[str]:
    for rule in found.rules:
        first, *others = (point.time_steps for point in found.of(rule))
        if others:
            yield (
                f"{rule}: {found.growth(rule):.2f} times the bytes at T = {others[-1]} as at T ="
                f" {first}"
            )
    fastest: dict[str, list[str]] = {}
    for T, cost in found.time_baselines.items():
        fastest.setdefault(cost.rule, []).append(str(T))
    if fastest:
        whose = ", ".join(f"{rule}'s at T = {', '.join(steps)}" for rule, steps in fastest.items())
        yield f"×: bytes over {BASELINE}'s, fwd+bwd over {whose}"
    there = {(point.cost.rule, point.time_steps) for point in found.points}
    refusals: dict[str, None] = {}  # each once
    for rule, at_T in found.refused.items():
        for T, why in at_T.items():
            untried = f"{rule}: its largest batch at T = {T} was not trained: {why}"
            refusals[untried if (rule, T) in there else f"not in the table: {why}"] = None
    yield from refusals
    yield (
        f"one batch of {counted(found.samples, 'sample')}; fwd+bwd: forward and backward alone,"
        f" without loading, optimizer and collectives; {format_hardware(found.hardware)}"
    )
    if found.memory_bytes is not None:
        how = (
            f"an estimate from what two batches took, {RESERVE:.0%} of the memory left free, not"
            " trained"
        )
        if found.at_largest:
            how = (
                '; without "about": trained, and fitted, or 0 where not even one sample did; with'
                f" it: {how}"
            )
        else:
            how = f"; about: {how}"
        yield (
            f"largest batch in {found.memory_bytes / 1e9:.3g} GB{how}; of training alone: an"
            " evaluation holds a batch at every time step, without a graph, and is not in it"
        )
    if found.teacher is not None:
        yield found.teacher.describe()


# ------------------------------------------------------------------------------------------- plan


def print_plan(
    plan: Plan, *, against: Mapping[str, Any] | None = None, console: Console | None = None
) -> None:
    """Print one line per rule, the basis of the figures, and the fastest rule.

    `against`: the errors of the plan beside a finished run.
    """
    console = console or new_console()
    rows: list[Row] = []
    for each in plan.rules:
        seconds = {
            "compute ms": each.compute_s,
            **({} if plan.teacher is None else {"teacher ms": each.teacher_s}),
            "sums ms": each.communication_s,
            "optimizer ms": each.optimizer_s,
            "step ms": each.step_s,
        }
        amounts = {
            "images/s": each.images_per_s,
            "hours": each.hours,
            "kWh": each.kwh,
            "cost": each.cost,
        }
        row: Row = {
            _RULE: each.rule,
            "ZeRO": str(each.zero),
            "micro x acc.": f"{each.micro_batch} x {each.accumulation}",
            "saved": f"{each.saved_bytes / 1e6:,.4g} MB",
            "memory": f"{each.memory_bytes / 1e9:.3g} GB",
            "TFLOP": f"{each.flops / 1e12:.4g}",
            "kernels": f"{each.kernels:,}",
        }
        row |= {title: f"{1e3 * value:.3g}" for title, value in seconds.items()}
        for title, value in amounts.items():
            if value is not None:
                row[title] = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        rows.append(row)
    _print_rows(console, rows, title=f"{plan.recipe}: {MODEL}")
    for why in plan.refused.values():
        say(console, f"not in the table: {why}")
    say(console, basis(plan))
    say(console, advice(plan))
    if against is not None:
        saved, step = against["saved_bytes"], against["step_s"]
        text = (
            f"Against {against['run']}, {against['rule']}: saved for backward"
            f" {saved['planned'] / 1e6:.4g} MB planned, {saved['measured'] / 1e6:.4g} MB measured,"
            f" {saved['error']:+.1%}; a step {step['planned'] * 1e3:.4g} ms planned,"
            f" {step['measured'] * 1e3:.4g} ms measured, {step['error']:+.1%}."
        )
        if against["own_cores"]:
            text += (
                " It had cores of its own; runs on the others, and the memory that they share, are"
                " in no plan."
            )
        say(console, text)


def plan_to_json(plan: Plan, against: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {
        "kind": MODEL,
        **asdict(plan),
        "basis": basis(plan),
        "advice": advice(plan),
        "against": against,
    }


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
        together = f", by {workers} workers at the same time," if workers > 1 else ""
        text += (
            " Seconds grow linearly with the batch from those of batches of"
            f" {' and '.join(map(str, plan.timed))} that were trained{together} on this machine"
            f" ({plan.device}); {left}; loaders keep up."
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
        text += (
            f" All figures of time and memory hold the teacher, {plan.teacher}:"
            f" {plan.teacher_bytes / 1e6:.4g} MB of weights."
        )
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


# ---------------------------------------------------------------------------------- a plan's errors


def read_against(recipe: Recipe, cluster: Cluster, folder: Path) -> Run:
    """Read the run that a plan of `recipe` on `cluster` is compared with.

    Raises:
        ReportError: the run has not finished, or its recipe, machines or workers differ from the
            plan's, or changed during the run.
    """
    run = read_run(folder)
    if not run.value("images_per_s") or not run.value("peak_saved_bytes"):
        raise ReportError(
            "plan: --against must be a run that has finished, of more than a few batches, on one"
            f" of which its saved bytes were counted; got {folder.name}"
        )
    on, *later = run.trained_on
    if later:
        raise ReportError(
            f"plan: --against must be a run that changed nothing on the way; {folder.name} did:"
            f" {listed(trained_apart([on], later))}"
        )
    there = on["hardware"]
    fields = [*differing("workers", cluster.workers, on["world_size"])]
    if cluster.device is not None:  # a plan for a card excludes the card's host
        fields += differing("card", cluster.device.driver, there["gpu"])
    else:
        fields += [
            (f"hardware.{name}", *values)
            for name, *values in hardware_differences(there, own_cores=on["own_cores"])
        ]
        fields += differing("cpus-per-worker", cluster.threads, there["threads"])
    recipes = (
        select(each, lambda role: Role.STUDY in role and Role.NO_STEP_COST not in role)
        for each in (recipe.resolved().to_json()["recipe"], run.recipe)
    )
    _refuse_if([*fields, *differing("", *recipes)], run)
    return run


def errors(found: Plan, run: Run) -> dict[str, Any]:
    """The errors of the plan for the rule that trained a finished run, as JSON values.

    Saved bytes and seconds of a step are planned and measured, with the relative error, which is
    positive if the plan was too high. A step is the mean over steady batches: not the first, and
    none with counted bytes or operations. `own_cores`: whether the run had its own cores. Runs on
    the other cores are in no plan.

    Raises:
        ReportError: the plan lacks the rule, has another rule of the same label, or has another
            micro-batch than the run.
    """
    planned = next((each for each in found.rules if each.rule == run.rule), None)
    if planned is None:
        raise ReportError(
            "plan: --against must be of a rule that is planned,"
            f" {', '.join(each.rule for each in found.rules) or 'none'}; got {run.rule} of"
            f" {run.folder.name}"
        )
    on, summary = run.trained_on[-1], run.summary or {}
    differs = [
        *differing("rule", {**planned.written}, run.recipe["rule"]),
        *differing("micro_batch", planned.micro_batch, on["micro_batch"]),
    ]
    _refuse_if(differs, run)
    batch_size = planned.images_per_s * planned.step_s
    pairs = {
        "saved_bytes": (planned.saved_bytes, summary["peak_saved_bytes"]),
        "step_s": (planned.step_s, batch_size / summary["images_per_s"]),
    }
    return {
        "run": run.folder.name,
        "rule": planned.rule,
        "own_cores": on["own_cores"],
        **{
            name: {"planned": plan, "measured": measured, "error": plan / measured - 1}
            for name, (plan, measured) in pairs.items()
        },
    }


def _refuse_if(differs: Sequence[tuple[str, Any, Any]], run: Run) -> None:
    if differs:
        shown = "; ".join(f"{name}: {a} and {b}" for name, a, b in differs[:4])
        raise ReportError(
            f"plan: --against must be a run of what is planned; {run.folder.name} differs: {shown}"
        )
