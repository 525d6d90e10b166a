"""The learning rates of sei_fashion.py: real and 1-bit weights with neither ingredient, at four
rates and two seeds, on a held-out tenth of the training set.

Command:  spiketrain write fashion --out data/fashion
          spiketrain launch recipes/compare/sei_fashion_rates.py --workers 1 --side-by-side auto
Source:   ours
Result:   0.6 for both: real .8914 at .06, .8979 at .2, .9007 at .6; 1-bit .8666 at .02, .8834 at
          .06, .8852 at .2, .8880 at .6; commit 38ba448ff81b, 2 cores of an AMD EPYC beside other
          programs, 31 minutes.

Each kind of weights gets the rate that is best in the mean of the seeds. A rate that is chosen
without the ingredients does not favour them.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from rich.console import Console

from pipeline.core.printing import number, print_table, prose
from pipeline.recipe import Recipe, Suite
from pipeline.track.run_state import top1_of
from recipes.compare.sei_fashion import FACTORS, NEITHER, trained

RATES, SEEDS, EPOCHS = (0.02, 0.06, 0.2, 0.6), (100, 101), 8


def recipe() -> Suite:
    trials = product(FACTORS["weights"], RATES, SEEDS)
    return Suite(tuple(_trial(*trial) for trial in trials), report=report)


def _trial(weights: str, rate: float, seed: int) -> Recipe:
    made = trial("rate", (weights, *NEITHER), rate, seed)
    return replace(made, optimizer=made.optimizer.with_(lr=rate))


def trial(what: str, cell: tuple[str, ...], value: float, seed: int) -> Recipe:
    """A short run of a cell on the held-out tenth, which tries a value of `what`."""
    made = trained(cell, epochs=EPOCHS)
    name = _name(what, cell[0], value, seed)
    return replace(made, name=name, data=made.data.with_(held_out=0.1), seed=seed)


def _name(what: str, weights: str, value: float, seed: int) -> str:
    return f"sei-fashion-{what}-{weights}-{value:g}-{seed}"


def report(runs: Mapping[str, Path], console: Console) -> None:
    print_trials("rate", RATES, runs, console)


def print_trials(
    what: str, values: Sequence[float], runs: Mapping[str, Path], console: Console
) -> None:
    """The top-1 of the trials of each value of `what`, for each kind of weights."""
    rows = []
    for weights, value in product(FACTORS["weights"], values):
        top1 = [top1_of(runs[_name(what, weights, value, seed)]) for seed in SEEDS]
        found = [each for each in top1 if each is not None]
        mean = f"{statistics.fmean(found):.2%}" if len(found) == len(SEEDS) else "diverged"
        each = ("diverged" if one is None else f"{one:.2%}" for one in top1)
        rows.append((weights, f"{value:g}", *each, mean))
    columns = (prose("weights"), number(what), *(number(f"seed {seed}") for seed in SEEDS))
    print_table(console, (*columns, number("mean")), rows)
