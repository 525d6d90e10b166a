"""The learning rate of recipes/stamps and of the stamps study: four cells, trained on labels, at
four rates, on split 3.

Command:  spiketrain write stamps --out data/stamps-3 --size 160 --split 3 --workers 2
          spiketrain launch recipes/compare/sei_stamps_rates.py --workers 2
Source:   ours; split 3 evaluates on objects that train in the splits of the study.
Result:   0.012 is best on the mean of the cells, .1988 top-1 (.003: .1885, .006: .1950, .024:
          .1873); commits 0e75b777cc84 and eb0a1203d0de, AMD EPYC. Table: docs/LOG.md, "Results that
          stood in the docstrings of recipes".

All cells get one rate, because the study compares networks and not rates. Runs take half of the
study's epochs.
"""

import statistics
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

from rich.console import Console

from pipeline.core.printing import number, print_table, prose
from pipeline.recipe import Evaluation, Suite
from pipeline.track.run_state import top1_of
from recipes.compare.sei_stamps import FACTORS, trained
from recipes.stamps.base import pictures

RATES = (3e-3, 6e-3, 12e-3, 24e-3)
EPOCHS = 6
CELLS = tuple(product(FACTORS["weights"], FACTORS["shortcuts"]))


def recipe() -> Suite:
    recipes = []
    for (weights, shortcuts), rate in product(CELLS, RATES):
        cell = trained(weights, shortcuts, "labels")
        changes = {
            "data": pictures("3"),
            "seed": 3,
            "epochs": EPOCHS,
            "evaluation": Evaluation(every=0),
        }
        optimizer = cell.optimizer.with_(lr=rate)
        recipes.append(
            replace(cell, name=_name(weights, shortcuts, rate), optimizer=optimizer, **changes)
        )
    return Suite(recipes=tuple(recipes), report=report)


def _name(weights: str, shortcuts: str, rate: float) -> str:
    return f"sei-stamps-rates-{weights}-{shortcuts}-{rate:g}"


def report(runs: Mapping[str, Path], console: Console) -> None:
    found = {key: top1_of(runs[_name(*key[0], key[1])]) for key in product(CELLS, RATES)}

    def told(values: list[float | None]) -> str:
        return (
            "diverged"
            if None in values
            else f"{statistics.fmean(value for value in values if value is not None):.2%}"
        )

    rows = [(", ".join(cell), *(told([found[cell, rate]]) for rate in RATES)) for cell in CELLS]
    rows.append(("mean", *(told([found[cell, rate] for cell in CELLS]) for rate in RATES)))
    print_table(console, (prose("cell"), *(number(f"lr {rate:g}") for rate in RATES)), rows)
