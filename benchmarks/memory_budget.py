"""The speeds that recipes/compare/memory_budget.py turns into steps, and its picture: top-1 against
the memory of a micro-batch in equal seconds, for each rule.

Command:  python -m benchmarks.memory_budget measure, on an idle machine before the first run
          python -m benchmarks.memory_budget, of the answers of the study
Result:   memory_budget_speeds.json beside the recipe, and docs/budget.svg
"""

import gc
import json
import math
import statistics
import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import groupby
from operator import itemgetter, truediv
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

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
    STEPS,
    Row,
    cell_of,
    shared,
    sizes_of,
    table,
)

ROUNDS, TIMED = 12, 2  # of the measured speeds: rounds, and batches in each


def main() -> None:
    if sys.argv[1:] == ["measure"]:
        measure()
    else:
        rows = table(new_console())
        require(rows, f"{NAME}: the picture needs the answers of all seeds")
        draw(rows, DOCS / "budget.svg")


def measure(processes: int = 2) -> None:
    """Write SPEEDS: for each rule in each budget its micro-batch and slice, with their speed. As
    many processes compute at the same time as runs of a launch.
    """
    require(
        not ANSWERS.exists(),
        f"{NAME}: speeds must be measured before the first run; got answers in {ANSWERS}",
    )
    cells = fewest_slices([cell for of in SETS for cell in largest_micro_batches(of)])
    made = {
        cell_name(cell_of(each)): replace(
            shared(each["set"], each["rule"], each["slice"]), micro_batch=each["micro_batch"]
        )
        for each in cells
        if each["micro_batch"]
    }
    seconds, _ = run_processes(NAME, batch_seconds, made, processes=processes)
    for each in cells:
        if each["micro_batch"]:
            each["seconds"] = round(seconds[cell_name(cell_of(each))]["batch"], 5)
    machine = hardware(device_here()) | {"threads": 1}
    found = {"commit": commit(), "machine": machine, "processes": processes, "cells": cells}
    write_whole(SPEEDS, (json.dumps(found, indent=1) + "\n").encode())


def fewest_slices(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the cells of a set, budget and rule, which are in a row, the one that computes a global
    batch in the fewest slices, where any fits.

    Mostly it is the fastest, too (docs/LOG.md); a short measurement does not tell slices apart. Of
    equals it is the shorter slice, with the larger micro-batch.
    """

    def slices(cell: dict[str, Any]) -> float:
        if not cell["micro_batch"]:
            return math.inf
        return BATCH // cell["micro_batch"] * (STEPS[cell["set"]] // cell["slice"])

    return [min(row, key=slices) for _, row in groupby(cells, itemgetter("set", "budget", "rule"))]


def largest_micro_batches(of: str) -> list[dict[str, Any]]:
    """For each budget, rule and slice: the limit, the largest micro-batch that holds no more, and
    the bytes that it holds. A micro-batch of 0: not even one sample fits.

    Bytes are those of the micro-batch, of what it keeps for backward and between time steps, and
    the rule's own. The weights, their gradients and the optimizer, which are the same for every
    rule, are not among them.
    """
    micro_batches = [size for size in range(1, BATCH + 1) if BATCH % size == 0]
    of_rules = sizes_of(STEPS[of])
    [whole] = of_rules["BPTT"]
    benches = {size: HoldsInput(shared(of, "BPTT", whole), size) for size in micro_batches}

    @cache
    def held(rule: str, size: int, micro_batch: int) -> int:
        bench = benches[micro_batch]
        return count_rule(bench, shared(of, rule, size).rule).all_bytes + bench.batch_bytes

    cells = []
    for budget in BUDGETS:
        limit = held("BPTT", whole, budget)
        for rule, size in [(rule, size) for rule, sizes in of_rules.items() for size in sizes]:
            bytes_of = partial(held, rule, size)
            smaller = bisect_right(micro_batches, limit, key=bytes_of)
            fits = micro_batches[smaller - 1] if smaller else 0
            cell = {"set": of, "budget": budget, "rule": rule, "slice": size, "micro_batch": fits}
            cells.append({**cell, "bytes": bytes_of(fits) if fits else 0, "limit": limit})
    return cells


class HoldsInput(FakeBench):
    """A bench that counts no bytes of its input: some rules save it whole, others copy slices.

    Its network has the input as a parameter, which is not counted as saved.
    """

    def copy_of_network(self) -> nn.Module:
        network = super().copy_of_network()
        network.register_parameter("input", nn.Parameter(self.x_TB, requires_grad=False))
        return network


def batch_seconds(device: torch.device, recipes: Mapping[str, Recipe]) -> Timings:
    """Seconds of a global batch of each recipe over ROUNDS, in which they alternate: the median of
    its shares of the rounds, times the median length of a round.

    Shares are taken because a shared machine computes at two thirds of its speed for minutes.
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
    lengths = [sum(each) for each in zip(*seconds.values(), strict=True)]
    length = statistics.median(lengths)
    shares = {name: map(truediv, each, lengths) for name, each in seconds.items()}
    return {name: {"batch": length * statistics.median(each)} for name, each in shares.items()}, {}


def draw(rows: Sequence[Row], out: Path) -> None:
    """Write the SVG of the rows of `table`. The same rows give the same file."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, len(SETS))
    names = [*sizes_of(STEPS[FASHION])]
    for axes, of in zip(panels, SETS, strict=True):
        of_set = [row for row in rows if row.of == of]
        for index, (rule, marker) in enumerate(zip(names, "osv^DX", strict=True)):
            trained = [row for row in of_set if row.rule == rule and row.top1]
            beside = 1.05 ** (index - (len(names) - 1) / 2)  # rules of a budget, side by side
            memory_mb = [beside * row.limit / 1e6 for row in trained]
            means = [statistics.fmean(row.top1) for row in trained]
            spread = [statistics.stdev(row.top1) if len(row.top1) > 1 else 0.0 for row in trained]
            axes.errorbar(memory_mb, means, spread, marker=marker, capsize=2, label=rule)
        ticks = {row.limit / 1e6: f"{row.limit / 1e6:.1f}\n{row.budget}" for row in of_set}
        axes.set(
            title=f"{of}, {SECONDS[of]:.0f} s of computation",
            xlabel="memory budget, MB (below: samples that BPTT holds)",
            ylabel=f"top-1 of {EVALUATED_ON[of]:,} samples, %",
            xscale="log",
        )
        axes.minorticks_off()
        axes.set_xticks([*ticks], [*ticks.values()])
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    save(figure, out)


if __name__ == "__main__":
    main()
