"""Runs that were really trained, in seconds: BPTT, SLTT and OTTT on a small network and noise, two
seeds of BPTT and SLTT.
"""

from dataclasses import replace
from pathlib import Path

from pipeline.recipe.recipe import Checkpointing, Evaluation, Recipe, Spec, spec
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from tests.helpers.small import small_recipe, train_inline

RUNS = {
    "bptt-0": spec(BPTT),
    "bptt-1": spec(BPTT),
    "sltt-0": spec(SLTT),
    "sltt-1": spec(SLTT),
    "ottt-0": spec(OTTT),
}


def train_real_study(runs_dir: Path) -> None:
    """In this process, without Ray and MLflow; all runs are of the study "s"."""
    for name, rule in RUNS.items():
        train_inline(runs_dir / name, _recipe(name, rule))


def _recipe(name: str, rule: Spec) -> Recipe:
    looks = 0 if name.startswith("bptt") else 1
    return replace(
        small_recipe(),
        name=name,
        rule=rule,
        seed=int(name[-1]),
        evaluation=Evaluation(fidelity_every=looks),
        checkpoints=Checkpointing(every=0),
    )
