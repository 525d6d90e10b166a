"""A study in blocks: all cells of one seed, trained on one machine, with their answers in a file.

    study = Blocks(name="sei-fashion", folder=Path(...), cells_of={0: (("real", "labels"), ...)},
                   recipe_of=trained, samples={"fashion": 10_000})

A launch trains the seeds whose file is missing. To repeat a study, move its folder away first: with
all files there, a launch trains all and keeps the written answers. `spiketrain resume SUITE` goes
on with a stopped launch. A new launch goes on by seeds once `python -m recipes.compare.STUDY RUNS`
has written those that are over.

A file `seed-N.json` holds a bit for each evaluation sample and cell, and what the runs of the block
have in common. So a study goes on over days and machines, and differences are taken within blocks.
No table is printed before all seeds have answers.
"""

# N samples, S seeds, R resamples, V different values

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from scipy import stats

from pipeline.core.checks import require
from pipeline.core.files import write_whole
from pipeline.core.printing import new_console, say
from pipeline.recipe import Recipe
from pipeline.recipe.json import read_json
from pipeline.track.run_state import is_over, state_of, top1_of
from pipeline.train.evaluation import read_predictions

Cell = tuple[str, ...]
Answers = dict[str, NDArray[np.bool_]]  # by the name of a cell: whether each sample is right


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Fields:

    name: the start of every run's name
    folder: of the files of answers
    cells_of: the cells of each seed
    recipe_of: the recipe of a cell; its name and seed are set here
    samples: by the name of a data folder: of its evaluation set, which every run must have answered
        in order; multiples of 8
    teacher: the recipe of the teacher of the runs that have one, and the top-1 in 0..1 that its own
        run must have reached
    machine: processor and torch on which all runs must be; None: one machine for each seed
    """

    name: str
    folder: Path
    cells_of: Mapping[int, tuple[Cell, ...]]
    recipe_of: Callable[[Cell], Recipe]
    samples: Mapping[str, int]
    teacher: tuple[Recipe, float] | None = None
    machine: str | None = None

    def recipes(self) -> list[Recipe]:
        """Of all cells of the seeds that have no answers; of all seeds once each has."""
        seeds = [seed for seed in self.cells_of if not self._file(seed).exists()]
        return [
            self._recipe(cell, seed)
            for seed in seeds or self.cells_of
            for cell in self.cells_of[seed]
        ]

    def write(self, runs: Mapping[str, Path], console: Console) -> None:
        """Write the answers of each seed whose runs are all over, unless it has some.

        Args:
            runs: folders by the names of their recipes.

        Raises: ValueError, see `_block`.
        """
        for seed, cells in self.cells_of.items():
            found = {
                cell: runs[name] for cell in cells if (name := self.run_name(cell, seed)) in runs
            }
            ends = {cell: state_of(run) for cell, run in found.items()}
            is_complete = len(found) == len(cells) and {*ends.values()} <= {"finished", "diverged"}
            if self._file(seed).exists() or not is_complete:
                continue
            finished = {cell: run for cell, run in found.items() if ends[cell] == "finished"}
            block = self._block(seed, finished)
            self.folder.mkdir(exist_ok=True)
            write_whole(self._file(seed), (json.dumps(block, indent=1) + "\n").encode())
            for cell in cells:
                if cell not in finished:
                    say(console, f"{self.name}: seed {seed} lacks {cell_name(cell)}: it diverged.")

    def written(self) -> dict[int, dict[str, Any]]:
        """The content of each seed's file: what its runs have in common, and by the name of a cell
        the hash of its recipe, seconds of training and answers.

        Raises: ValueError for answers of another recipe than a cell's, or of several contents of a
            data folder.
        """
        files = {seed: self._file(seed) for seed in self.cells_of}
        blocks = {seed: read_json(file) for seed, file in files.items() if file.exists()}
        recipes = {cell_name(cell): _hash(self.recipe_of(cell)) for cell in self._all_cells()}
        contents: dict[str, str] = {}
        for seed, block in blocks.items():
            for cell, found in block["recipes"].items():
                require(
                    found == recipes[cell],
                    f"{self.name}: the answers of seed {seed} must be of today's recipe of {cell}",
                )
            for folder, content in block["contents"].items():
                require(
                    content == contents.setdefault(folder, content),
                    f"{self.name}: the answers of seed {seed} must be on the {folder} of others",
                )
        return blocks

    def read(self, console: Console) -> dict[int, Answers]:
        """The answers of all seeds. Before all seeds have some: {}, and a line, so that no result
        is seen while settings may still change.
        """
        blocks = self.written()
        if len(blocks) < len(self.cells_of):
            say(console, f"{self.name}: {len(blocks)} of {len(self.cells_of)} seeds have answers.")
            return {}
        right = {}
        for seed, block in blocks.items():
            texts: dict[str, str] = block["cells"]
            packed = {cell: np.frombuffer(bytes.fromhex(x), np.uint8) for cell, x in texts.items()}
            right[seed] = {cell: np.unpackbits(x).astype(bool) for cell, x in packed.items()}
        return right

    def main(self, report: Callable[[Mapping[str, Path], Console], object]) -> None:
        """Report on the runs in the folder that the command line names, `runs` by default."""
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
        jobs = sorted(folder.glob(f"{self.name}-[0-9]*/recipe.json"))
        over = [each for each in jobs if is_over(each.parent, is_needed=False)]
        report({read_json(each)["recipe"]["name"]: each.parent for each in over}, new_console())

    def _file(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}.json"

    def _all_cells(self) -> set[Cell]:
        return {cell for cells in self.cells_of.values() for cell in cells}

    def run_name(self, cell: Cell, seed: int) -> str:
        words = "-".join((self.name, str(seed), *cell))
        return words.lower().replace(", ", "-").replace(" ", "-")

    def _recipe(self, cell: Cell, seed: int) -> Recipe:
        return replace(self.recipe_of(cell), name=self.run_name(cell, seed), seed=seed)

    def _block(self, seed: int, runs: Mapping[Cell, Path]) -> dict[str, Any]:
        """The content of a seed's file.

        Raises: ValueError for a run of another recipe than its cell's, of several workers, on other
            samples or another machine, for runs of several contents, machines or teachers, and for
            a teacher of another recipe or below its top-1.
        """
        machines: set[str] = set()
        teachers: set[tuple[str, float]] = set()
        block: dict[str, Any] = {"recipes": {}, "contents": {}, "train_s": {}, "cells": {}}
        commits: set[str] = set()
        for cell, run in runs.items():
            found, summary = Recipe.read(run / "recipe.json"), read_json(run / "summary.json")
            name, folder = cell_name(cell), Path(found.data.kwargs["folder"]).name
            right = read_predictions(run / "answers.npz")
            content = summary["data_fingerprint"]
            for words, holds in {
                "have the recipe of its cell and seed": (
                    _without_paths(found) == _without_paths(self._recipe(cell, seed))
                ),
                "have one worker and one start": (
                    summary["world_size"] == len(summary["trained_on"]) == 1
                ),
                f"have answered {self.samples[folder]:,} samples": (
                    np.array_equal(right.index, np.arange(self.samples[folder]))
                ),
                f"have the content of the others' {folder}": (
                    content == block["contents"].setdefault(folder, content)
                ),
            }.items():
                require(holds, f"{self.name}: {run.name} must {words}")
            if found.teacher is not None:
                teachers.add(self._teacher(Path(found.teacher.kwargs["weights"])))
            commits |= {*summary["commits"]}
            machine = "{cpu}, torch {torch}".format(**summary["hardware"])
            require(
                self.machine in (None, machine),
                f"{self.name}: {run.name} must be on {self.machine}; got {machine}",
            )
            machines.add(machine)
            block["recipes"][name] = _hash(found)
            block["train_s"][name] = round(summary["train_s"], 1)
            block["cells"][name] = np.packbits(right.is_correct).tobytes().hex()
        for what, values in (("machine", machines), ("teacher", teachers)):
            require(
                len(values) <= 1,
                f"{self.name}: the runs of a seed must have one {what}; got {sorted(values)}",
            )
        return {
            "commits": sorted(commits),
            "machine": "".join(machines),
            "teacher": [*teachers],
            **block,
        }

    def _teacher(self, weights: Path) -> tuple[str, float]:
        """The hash of a teacher's weights, and the top-1 of its own run."""
        assert self.teacher is not None, "a study of runs with a teacher names its recipe"
        recipe, least = self.teacher
        top1 = top1_of(weights.parent) or 0.0
        require(
            _without_paths(Recipe.read(weights.parent / "recipe.json")) == _without_paths(recipe),
            f"{self.name}: the teacher {weights.parent.name} must have the recipe of the study's",
        )
        require(
            top1 >= least,
            f"{self.name}: the teacher must reach {least:.1%}; got {top1:.2%}",
        )
        return hashlib.sha256(weights.read_bytes()).hexdigest(), top1


def cell_name(cell: Cell) -> str:
    return ", ".join(cell)


def _without_paths(recipe: Recipe) -> Recipe:
    taught_by = recipe.teacher and recipe.teacher.with_(weights="", cache=None)
    return replace(recipe, data=recipe.data.with_(folder=""), teacher=taught_by)


def _hash(recipe: Recipe) -> str:
    """Of all that decides a cell's results but its seed."""
    shared = replace(_without_paths(recipe), name="cell", seed=0).to_json()
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:12]


def interval(
    value_SN: NDArray[np.float64], draw: np.random.Generator, resamples: int
) -> tuple[float, float]:
    """The 95 % interval of the mean over seeds and images, both of which are samples.

    A resample draws seeds, by their means, and images, by theirs, with replacement, and adds the
    deviations of both. What is of one seed and one image alone is in both, so that with the
    variances a of seeds, b of images and e of the rest the expected variance is

        a / S + b / N + 2 e / (S N)

    instead of one e. Where seeds and images are weighed in one product, it is three (Owen 2007,
    arXiv:0712.1111). Deviations of seeds are widened, because resamples of S seeds vary less than
    seeds do, by 1 - 1/S, and Student's quantile is due (Hesterberg 2014, arXiv:1411.5279).
    """
    S, N = value_SN.shape
    if S == 1:
        return -np.inf, np.inf
    mean = value_SN.mean()
    seeds_R = draw.multinomial(S, np.full(S, 1 / S), size=resamples) @ value_SN.mean(1) / S - mean
    # Images of one value are drawn together.
    value_V, images_V = np.unique(value_SN.sum(0), return_counts=True)
    images_R = draw.multinomial(N, images_V / N, size=resamples) @ value_V / (S * N) - mean
    widening = stats.t.ppf(0.975, S - 1) / stats.norm.ppf(0.975) / np.sqrt(1 - 1 / S)
    low, high = np.percentile(mean + widening * seeds_R + images_R, (2.5, 97.5))
    return float(low), float(high)
