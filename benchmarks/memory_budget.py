"""The speeds that recipes/compare/memory_budget.py turns into steps, and its picture: top-1 against
the memory of a micro-batch in equal seconds, for each rule.

Command:  python -m benchmarks.memory_budget measure, on an idle machine before the first run
          python -m benchmarks.memory_budget, of the answers of the study
Result:   memory_budget_speeds.json beside the recipe; the picture, budget.svg, is not drawn yet
"""

import gc
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.memory_picture import DOCS, save
from pipeline.core.checks import require
from pipeline.core.code_version import commit
from pipeline.core.files import write_whole
from pipeline.core.printing import new_console
from pipeline.forecast.bench import Bench, interleave
from pipeline.forecast.rule_timing import Timings, run_processes
from pipeline.forecast.step_counts import FakeBench, count_rule
from pipeline.measure.memory import device_here, hardware
from pipeline.recipe import Recipe
from recipes.compare.blocks_base import cell_name
from recipes.compare.memory_budget import (
    ANSWERS,
    BATCH,
    BUDGETS,
    EVALUATED_ON,
    FASHION,
    NAME,
    SECONDS,
    SETS,
    SPEEDS,
    Row,
    cell_of,
    rules,
    shared,
    table,
)

ROUNDS, TIMED = 5, 3  # of the measured speeds: rounds, and batches in each


def main() -> None:
    if sys.argv[1:] == ["measure"]:
        measure()
    else:
        draw(table(new_console()), DOCS / "budget.svg")


def measure(processes: int = 2) -> None:
    """Write SPEEDS. As many processes compute at the same time as runs of a launch."""
    require(
        not ANSWERS.exists(),
        f"{NAME}: speeds must be measured before the first run; got answers in {ANSWERS}",
    )
    cells = [cell for of in SETS for cell in largest_micro_batches(of)]
    made = {
        cell_name(cell_of(each)): replace(
            shared(each["set"], each["rule"]), micro_batch=each["micro_batch"]
        )
        for each in cells
        if each["micro_batch"]
    }
    seconds, _ = run_processes(NAME, batch_seconds, made, processes=processes)
    for each in cells:
        if each["micro_batch"]:
            each["seconds"] = round(seconds[cell_name(cell_of(each))]["batch"], 5)
    machine = hardware(device_here())
    found = {"commit": commit(), "machine": machine, "processes": processes, "cells": cells}
    write_whole(SPEEDS, (json.dumps(found, indent=1) + "\n").encode())


def largest_micro_batches(of: str) -> list[dict[str, Any]]:
    """For each budget and rule: its limit, the largest micro-batch that keeps no more, and the
    bytes that it keeps. A micro-batch of 0: not even one sample fits.

    Bytes are those that a micro-batch keeps for backward and between time steps, and the rule's own
    (`Cost.all_bytes`). The weights, their gradients, the optimizer and the batch itself, which are
    the same for every rule, are not among them.
    """
    sizes = [size for size in range(1, BATCH + 1) if BATCH % size == 0]
    benches = {size: FakeBench(shared(of, "BPTT"), size) for size in sizes}
    kept = {
        name: {size: count_rule(bench, rule).all_bytes for size, bench in benches.items()}
        for name, rule in rules(of).items()
    }
    cells = []
    for budget, (rule, bytes_of) in product(BUDGETS, kept.items()):
        limit = kept["BPTT"][budget]
        fits = max((size for size in sizes if bytes_of[size] <= limit), default=0)
        cell = {"set": of, "budget": budget, "rule": rule, "micro_batch": fits}
        cells.append({**cell, "bytes": bytes_of.get(fits, 0), "limit": limit})
    return cells


def batch_seconds(device: torch.device, recipes: Mapping[str, Recipe]) -> Timings:
    """Median seconds of a global batch of each recipe over rounds in which they alternate.

    Seconds are those of the training loop, optimizer included, without data and collectives.
    """
    benches = {name: Bench(each) for name, each in recipes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in recipes}
    for name in interleave(recipes, ROUNDS):
        gc.collect()
        each = recipes[name]
        accumulation = each.split(1).accumulation
        parts = benches[name].seconds(each.rule, batches=TIMED, accumulation=accumulation)
        seconds[name].append(sum(parts.values()) - parts["communication"])
    return {name: {"batch": statistics.median(each)} for name, each in seconds.items()}, {}


def draw(rows: Sequence[Row], out: Path) -> None:
    """Write the SVG of the rows of `table`. The same rows give the same file."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(SETS))
    for axes, of in zip(panels, SETS, strict=True):
        of_set = [row for row in rows if row.of == of]
        for rule in rules(FASHION):
            trained = [row for row in of_set if row.rule == rule and row.top1]
            memory_mb = [row.limit / 1e6 for row in trained]
            means = [statistics.fmean(row.top1) for row in trained]
            spread = [statistics.stdev(row.top1) if len(row.top1) > 1 else 0.0 for row in trained]
            axes.errorbar(memory_mb, means, spread, marker="o", label=rule)
        ticks = {row.limit / 1e6: f"{row.limit / 1e6:.1f}\n{row.budget}" for row in of_set}
        axes.set(
            title=f"{of}, {SECONDS[of]:.0f} s of training",
            xlabel="MB of a micro-batch: what BPTT keeps of so many samples",
            ylabel=f"top-1 of {EVALUATED_ON[of]:,} samples, %",
            xscale="log",
        )
        axes.minorticks_off()
        axes.set_xticks([*ticks], [*ticks.values()])
        axes.grid(alpha=0.3)
    panels[-1].legend(frameon=False)
    save(figure, out)


if __name__ == "__main__":
    main()
