"""SEI-BWSNN taken apart: {full precision, 1-bit FFN} x {a shortcut around each block, around each
synapse} x {labels, a teacher}, on three splits of stamps, with three controls.

Command:  for split in 0 1 2; do spiketrain write stamps --out data/stamps-$split --size 160 --split
          $split --workers 2; done; spiketrain launch recipes/compare/sei_stamps.py --workers 2
Source:   Meng et al. 2025 (SEI-BWSNN), arXiv:2508.12609, only its abstract is public: the network
          is a reconstruction (recipes/stamps/qkformer_sei_bw.py), the rest is ours.
Result:   1-bit weights with both ingredients gain 1.83 points (-0.55 to +4.31) over plain 1-bit,
          not the 5 aimed at; 36 runs, commit ac61a0dd095f, AMD EPYC. Tables and the definitions of
          cells and intervals: docs/LOG.md, "Results that stood in the docstrings of recipes".

Runs of a split share seed, learning rate and epochs. Controls: `smoothed` labels are as uncertain
as the teacher's answers; `peer` is taught by a full-precision network of the same size; `narrow` is
full precision with 4 % more stored bits.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.core.printing import say
from pipeline.models.teachers.network import network_teacher
from pipeline.models.transforms import binarized
from pipeline.recipe import Recipe, Suite, spec
from pipeline.recipe.json import read_json
from pipeline.track.run_state import state_of
from pipeline.train.objective import CrossEntropy
from recipes.compare.factorial_base import Levels, all_effects, effect, factorial, read_right
from recipes.stamps.base import pictures, sei_first_stage

SPLITS = ("0", "1", "2")
FACTORS: dict[str, Levels] = {
    "weights": ("full", "1-bit"),
    "shortcuts": ("block", "multiple"),
    "taught by": ("labels", "teacher"),
}
CONTROLS = (("smoothed",), ("peer",), ("narrow",))
PLAIN, SEI = ("1-bit", "block", "labels"), ("1-bit", "multiple", "teacher")
PEER_SEED = 100  # beside the split: weights and order of its own

# Label smoothing whose targets are as uncertain, in nats, as the teacher's answers are in the mean
# over views in training (benchmarks/stamps_teacher.py).
SMOOTHING = {"0": 0.1202, "1": 0.1231, "2": 0.1364}


def recipe() -> Suite:
    return Suite(
        recipes=tuple(each for split in SPLITS for each in _of_split(split)), report=report
    )


def _of_split(split: str) -> Iterator[Recipe]:
    for cell in product(*FACTORS.values()):
        yield _child(split, cell, trained(*cell))
    by_labels, by_teacher = (
        trained("1-bit", "multiple", "labels"),
        trained("full", "multiple", "teacher"),
    )
    yield _child(
        split,
        ("smoothed",),
        replace(by_labels, objective=spec(CrossEntropy, label_smoothing=SMOOTHING[split])),
    )
    teacher = trained("full", "multiple", "labels")
    yield replace(_child(split, ("peer-alone",), teacher), seed=PEER_SEED + int(split))
    weights = f"@{_name(split, ('peer-alone',))}"
    peer = spec(
        network_teacher, model=teacher.model, weights=weights, time_steps=teacher.time_steps
    )
    yield _child(split, ("peer",), replace(by_labels, objective=by_teacher.objective, teacher=peer))
    yield _child(
        split,
        ("narrow",),
        replace(by_teacher, model=by_teacher.model.with_(channels=112, expansion=3)),
    )


def trained(weights: str, shortcuts: str, taught_by: str) -> Recipe:
    """A cell of the table, on whichever split the small QKFormer is."""
    recipe = sei_first_stage()
    network = recipe.model.with_(shortcut={"block": "membrane", "multiple": "multiple"}[shortcuts])
    if weights == "1-bit":
        network = spec(binarized, network=network, part="ffn", weights="scaled")
    recipe = replace(recipe, model=network)
    if taught_by == "teacher":
        return recipe
    return replace(recipe, objective=spec(CrossEntropy), teacher=None)


def _child(split: str, cell: tuple[str, ...], recipe: Recipe) -> Recipe:
    return replace(recipe, name=_name(split, cell), data=pictures(split), seed=int(split))


def _name(split: str, cell: tuple[str, ...]) -> str:
    return "-".join(("sei-stamps", split, *cell))


def report(runs: Mapping[str, Path], console: Console) -> dict[str, Any]:
    if lost := [run.name for run in runs.values() if state_of(run) == "diverged"]:
        raise ValueError(
            "sei-stamps: every cell must have finished, for effects are of all of them;"
            f" {', '.join(lost)} diverged"
        )
    cells = {
        cell: {split: runs[_name(split, cell)] for split in SPLITS}
        for cell in (*product(*FACTORS.values()), *CONTROLS)
    }
    contrasts = {
        "1-bit: both - neither": {SEI: 1, PLAIN: -1},
        **all_effects(FACTORS),
        "1-bit: multiple - block": effect(FACTORS, "shortcuts", at={"weights": "1-bit"}),
        "1-bit: teacher - labels": effect(FACTORS, "taught by", at={"weights": "1-bit"}),
        "neither: 1-bit - full": {PLAIN: 1, ("full", *PLAIN[1:]): -1},
        "both: 1-bit - full": {SEI: 1, ("full", *SEI[1:]): -1},
        "teacher - smoothed labels": {SEI: 1, ("smoothed",): -1},
        "teacher - peer": {SEI: 1, ("peer",): -1},
        "1-bit - full precision in as many bits": {SEI: 1, ("narrow",): -1},
    }
    tables = {by: factorial(read_right(cells, by=by), contrasts) for by in ("object", "ground")}
    for by, table in tables.items():
        table.render(console, by=by)
    for who, cell in (("teacher", SEI), ("peer", ("peer",))):
        shares = [
            read_json(cells[cell][split] / "summary.json")["teacher_top1"] for split in SPLITS
        ]
        say(
            console,
            f"{who} alone: {', '.join(f'{share:.2%}' for share in shares)} in splits"
            f" {', '.join(SPLITS)}",
        )
    return {by: table.to_dict() for by, table in tables.items()}
