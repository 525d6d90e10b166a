"""A probe as two tables and a sentence."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from rich.console import Console

from pipeline.core.printing import Column, new_console, number, print_table, say
from pipeline.core.units import counted
from pipeline.forecast.bench import Cost
from pipeline.forecast.probe import Probe, advice
from pipeline.measure.memory import format_hardware
from pipeline.recipe import BASELINE


def print_probe(found: Probe, *, as_json: bool = False, console: Console | None = None) -> None:
    """What each rule costs; what it drops, layer by layer; what cannot train the network, or be
    compared; and the advice.
    """
    console = console or new_console()
    if as_json:
        console.out(json.dumps(probe_as_json(found), indent=2, allow_nan=False), highlight=False)
        return
    _print_costs(found, console)
    if found.fidelity is not None:
        console.print()
        _print_layers(found, console)
    console.print()
    for rule, why in found.refused.items():
        say(
            console,
            (
                f"not in the tables: {rule}: {why}"
                if not why.startswith(rule)
                else f"not in the tables: {why}"
            ),
        )
    for why in found.uncompared.values():
        say(console, f"not compared: {why}")
    if (fastest := found.time_baseline) is not None:
        told = f"bytes and operations over {BASELINE}'s, seconds over {fastest.rule}'s"
        say(console, f"×: {told}, the faster of {BASELINE} folded and in slices of time")
    if unknown := sorted({name for cost in found.costs for name in cost.not_counted}):
        say(console, f"mult and add leave out what no count knows: {', '.join(unknown)}")
    on = format_hardware(found.hardware)
    say(
        console,
        f"one batch of {counted(found.samples, 'sample')}, T = {found.time_steps}, before any"
        f" training; {on}",
    )
    if found.teacher is not None:
        say(console, found.teacher.describe())
    say(console, advice(found))


def probe_as_json(found: Probe) -> dict[str, Any]:
    fastest = found.time_baseline
    told = {"time_baseline": None if fastest is None else fastest.rule, "advice": advice(found)}
    return _told({**asdict(found), **told})


def _told(value: Any) -> Any:
    """What JSON can say: null for what is not a number."""
    if isinstance(value, dict):
        return {key: _told(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_told(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _print_costs(found: Probe, console: Console) -> None:
    own = ("rule's own",) if any(cost.rule_bytes for cost in found.costs) else ()
    titles = ("saved", "states beside", *own, "forward", "backward", "mult/sample", "add/sample")
    rows = [_cells(cost, found, has_own=bool(own)) for cost in found.costs]
    columns = ("rule", *map(number, titles), Column("least cosine", is_right=True, wraps=True))
    print_table(console, columns, rows, title=found.recipe)


def _cells(cost: Cost, found: Probe, *, has_own: bool) -> tuple[str, ...]:
    def beside(value: float, name: str) -> str:
        base = found.time_baseline if name.endswith("_s") else found.cost(BASELINE)
        of = 0.0 if base is None else getattr(base, name)
        return f"\t×{value / of:.2f}" if of else ""

    least = ""
    if found.fidelity is not None and cost.rule in found.fidelity.cosines:
        layer, cosine = found.fidelity.lowest(cost.rule)
        least = "-" if math.isnan(cosine) else f"{cosine:.2f} {layer}"
    return (
        cost.rule,
        f"{cost.peak_saved_bytes / 1e6:.4g} MB{beside(cost.peak_saved_bytes, 'peak_saved_bytes')}",
        f"{cost.state_bytes / 1e6:.4g} MB",
        *((f"{cost.rule_bytes / 1e6:.4g} MB",) if has_own else ()),
        f"{cost.forward_s * 1e3:.4g} ms{beside(cost.forward_s, 'forward_s')}",
        f"{cost.backward_s * 1e3:.4g} ms{beside(cost.backward_s, 'backward_s')}",
        f"{cost.multiplications / 1e6:.4g} M{beside(cost.multiplications, 'multiplications')}",
        f"{cost.additions / 1e6:.4g} M{beside(cost.additions, 'additions')}",
        least,
    )


def _print_layers(found: Probe, console: Console) -> None:
    assert found.fidelity is not None
    share, cosines = found.fidelity.temporal_share, found.fidelity.cosines
    titles, rows = (*(["temporal share"] if share else []), *cosines), []
    for layer in next(iter(cosines.values()), {}):
        first = [share[layer]] if share else []
        rows.append(
            (
                layer,
                *(
                    _number(value)
                    for value in (*first, *(each[layer] for each in cosines.values()))
                ),
            )
        )
    print_table(console, ("layer", *map(number, titles)), rows, title="cosine with BPTT's gradient")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
