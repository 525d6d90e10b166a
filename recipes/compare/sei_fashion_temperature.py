"""The temperature of the teacher's answers in sei_fashion.py, on a held-out tenth of the training
set, and how uncertain these answers are.

Command:  spiketrain write fashion --out data/fashion
          spiketrain launch recipes/compare/sei_fashion_temperature.py --workers 1 --side-by-side
          auto
Source:   ours
Result:   temperature 1: real .9026, at 4 .8999; 1-bit .8931, at 4 .8896; 0.3139 nats at 1, as
          smoothing of 0.0568; commit c70cf9dc, 2 cores of an AMD EPYC beside other programs, 20
          minutes without the teacher.

Cells with both ingredients, at the rates of sei_fashion.py. The report also prints the mean entropy
of the teacher's answers to one epoch of training views, and the label smoothing whose targets are
as uncertain: 1 - e on the label and e / K on each of K classes.
"""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from itertools import product
from math import log
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from scipy.optimize import root_scalar
from torch.distributions import Categorical

from pipeline import load
from pipeline.core.printing import say
from pipeline.recipe import Recipe, Suite
from pipeline.spiking.encode import to_time_first
from pipeline.track.run_state import top1_of
from recipes.compare.sei_fashion import BOTH, FACTORS, TEACHER, teacher, trained
from recipes.compare.sei_fashion_rates import SEEDS, print_trials, trial

TEMPERATURES = (1.0, 4.0)


def recipe() -> Suite:
    trials = product(FACTORS["weights"], TEMPERATURES, SEEDS)
    return Suite((teacher(), *(_trial(*trial) for trial in trials)), report=report)


def _trial(weights: str, temperature: float, seed: int) -> Recipe:
    made = trial("temperature", (weights, *BOTH), temperature, seed)
    return replace(made, objective=made.objective.with_(temperature=temperature))


def report(runs: Mapping[str, Path], console: Console) -> None:
    print_trials("temperature", TEMPERATURES, runs, console)
    logits_NK = _answers(runs[TEACHER])
    say(console, f"The teacher alone, on the held-out tenth: {top1_of(runs[TEACHER]):.2%}.")
    for temperature in TEMPERATURES:
        entropy = Categorical(logits=logits_NK.double() / temperature).entropy().mean().item()
        say(
            console,
            f"At temperature {temperature:g} its answers in training have {entropy:.4f} nats, as"
            f" label smoothing of {_smoothing_of(entropy, classes=10):.4f}.",
        )


@torch.no_grad()
def _answers(run: Path) -> torch.Tensor:
    """The teacher's logits for an epoch of the views that the students train on."""
    network, data = load(run), trained(("real", *BOTH)).data.build()
    loader: Any = data.train(seed=SEEDS[0], batch_size=100, micro_batch=100)
    with closing(loader), loader.epoch(0) as batches:
        return torch.cat([network(to_time_first(batch.x, 1)).mean(0) for batch in batches])


def _smoothing_of(entropy: float, *, classes: int) -> float:
    """The share e for which (1 - e) on the label and e / K on every class have this entropy."""

    def excess(share: float) -> float:
        other = share / classes
        label = 1 - share + other
        return -label * log(label) - (classes - 1) * other * log(other) - entropy

    return float(root_scalar(excess, bracket=(1e-9, 1 - 1e-9)).root)
