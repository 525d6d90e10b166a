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
from collections.abc import Mapping
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
    made = trained((weights, *NEITHER), epochs=EPOCHS)
    return replace(
        made,
        name=_name(weights, rate, seed),
        data=made.data.with_(held_out=0.1),
        optimizer=made.optimizer.with_(lr=rate),
        seed=seed,
    )


def _name(weights: str, rate: float, seed: int) -> str:
    return f"sei-fashion-rate-{weights}-{rate:g}-{seed}"


def report(runs: Mapping[str, Path], console: Console) -> None:
    rows = []
    for weights, rate in product(FACTORS["weights"], RATES):
        top1 = [top1_of(runs[_name(weights, rate, seed)]) for seed in SEEDS]
        found = [each for each in top1 if each is not None]
        mean = f"{statistics.fmean(found):.2%}" if len(found) == len(SEEDS) else "diverged"
        rows.append((weights, f"{rate:g}", *(f"{each:.2%}" for each in found), mean))
    columns = (prose("weights"), number("lr"), *(number(f"seed {each}") for each in SEEDS))
    print_table(console, (*columns, number("mean")), rows)
