"""The learning rates of credit_flashes.py: each rule at three rates, on a held-out tenth of the
training sets of T = 8, gap 2, and T = 16, gap 4.

Command:  spiketrain write events flashes ...      (both sets, as credit_flashes.py has them)
          spiketrain launch recipes/compare/credit_flashes_rates.py --workers 1 --side-by-side auto
Source:   ours
Result:   best are 0.03 for BPTT and truncated BPTT, 0.003 for SLTT with learnt leaks, 0.01 for the
          others; commit c70cf9dcee94, AMD EPYC. Table: docs/LOG.md, "Learning rates of the study of
          credit over time".

Each rule gets the rate that is best in the mean of both sets.
"""

import statistics
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

from rich.console import Console

from pipeline.core.printing import number, print_table, prose
from pipeline.recipe import Recipe, Suite
from pipeline.track.run_state import top1_of
from recipes.compare.credit_flashes import RULES, trained

RATES, SETS, SEED = (0.003, 0.01, 0.03), ("flashes-8-2", "flashes-16-4"), 100


def recipe() -> Suite:
    return Suite(tuple(_trial(*trial) for trial in product(RULES, RATES, SETS)), report=report)


def _trial(rule: str, rate: float, name: str) -> Recipe:
    made = trained((name, rule))
    return replace(
        made,
        name=_name(rule, rate, name),
        optimizer=made.optimizer.with_(lr=rate),
        data=made.data.with_(held_out=0.1),
        seed=SEED,
    )


def _name(rule: str, rate: float, name: str) -> str:
    return f"credit-rate-{rule}-{rate:g}-{name}".lower().replace(", ", "-").replace(" ", "-")


def report(runs: Mapping[str, Path], console: Console) -> None:
    """The top-1 of each rule and rate on both sets, in percent, and its mean."""
    rows = []
    for rule, rate in product(RULES, RATES):
        top1 = [100 * (top1_of(runs[_name(rule, rate, name)]) or 0.0) for name in SETS]
        cells = (f"{each:.2f}" for each in (*top1, statistics.fmean(top1)))
        rows.append((rule, f"{rate:g}", *cells))
    columns = (prose("rule"), number("rate"), *map(number, SETS), number("mean"))
    print_table(console, columns, rows)
