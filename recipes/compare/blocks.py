"""A study in blocks: all cells of one seed, trained on one machine, with their answers in a file.

    study = Blocks(name="sei-fashion", folder=Path(...), cells_of={0: (("real", "labels"), ...)},
                   recipe_of=trained, samples=10_000)

A launch trains the seeds whose file is missing. A file `seed-N.json` holds a bit for each
evaluation sample and cell, and what the runs of the block have in common. So a study goes on over
days and machines, and differences are taken within blocks.
"""

# N samples, S seeds, R resamples, V different values

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from pipeline.core.checks import require
from pipeline.core.files import write_whole
from pipeline.core.printing import new_console, say
from pipeline.recipe import Recipe
from pipeline.recipe.json import read_json
from pipeline.track.run_state import is_over, state_of, top1_of
from pipeline.train.evaluation import read_predictions
from recipes.compare.factorial_base import cell_name, student_widening

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
    least_teacher: the top-1 in 0..1 that a teacher of the runs must have had in its own run
    """

    name: str
    folder: Path
    cells_of: Mapping[int, tuple[Cell, ...]]
    recipe_of: Callable[[Cell], Recipe]
    samples: Mapping[str, int]
    least_teacher: float = 0.0

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
        their seconds of training and their answers.
        """
        files = {seed: self._file(seed) for seed in self.cells_of}
        return {seed: read_json(file) for seed, file in files.items() if file.exists()}

    def read(self) -> dict[int, Answers]:
        """The answers of each seed that has a file."""
        right = {}
        for seed, block in self.written().items():
            packed = {
                cell: np.frombuffer(bytes.fromhex(x), np.uint8)
                for cell, x in block["cells"].items()
            }
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

    def run_name(self, cell: Cell, seed: int) -> str:
        words = "-".join((self.name, str(seed), *cell))
        return words.lower().replace(", ", "-").replace(" ", "-")

    def _recipe(self, cell: Cell, seed: int) -> Recipe:
        return replace(self.recipe_of(cell), name=self.run_name(cell, seed), seed=seed)

    def _block(self, seed: int, runs: Mapping[Cell, Path]) -> dict[str, Any]:
        """The content of a seed's file.

        Raises: ValueError for a run of another recipe than its cell's or on other samples, for
            runs of several commits, contents, machines or teachers, and for a teacher below
            `least_teacher`.
        """
        shared: dict[str, set[Any]] = defaultdict(set)
        answers: dict[str, str] = {}
        seconds: dict[str, float] = {}
        for cell, run in runs.items():
            found, summary = Recipe.read(run / "recipe.json"), read_json(run / "summary.json")
            require(
                _without_paths(found) == _without_paths(self._recipe(cell, seed)),
                f"{self.name}: {run.name} must have the recipe of its cell and seed",
            )
            predictions = read_predictions(run / "answers.npz")
            folder = Path(found.data.kwargs["folder"]).name
            require(
                np.array_equal(predictions.index, np.arange(self.samples[folder])),
                f"{self.name}: {run.name} must have answered {self.samples[folder]:,} samples",
            )
            shared["commit"] |= {*summary["commits"]}
            shared["machine"].add(summary["hardware"]["cpu"])
            shared[f"content of {folder}"].add(summary["data_fingerprint"])
            if found.teacher is not None:
                weights = Path(found.teacher.kwargs["weights"])
                shared["teacher"].add(hashlib.sha256(weights.read_bytes()).hexdigest())
                shared["top-1 of the teacher"].add(top1_of(weights.parent))
            seconds[cell_name(cell)] = round(summary["train_s"], 1)
            answers[cell_name(cell)] = np.packbits(predictions.is_correct).tobytes().hex()
        for what, values in shared.items():
            require(
                len(values) == 1,
                f"{self.name}: the runs of a seed must have one {what}; got {sorted(values)}",
            )
        block = {what: values.pop() for what, values in shared.items()}
        top1 = block.get("top-1 of the teacher", 1.0)
        require(
            top1 >= self.least_teacher,
            f"{self.name}: the teacher must reach {self.least_teacher:.1%}; got {top1:.2%}",
        )
        return {**block, "train_s": seconds, "cells": answers}


def _without_paths(recipe: Recipe) -> Recipe:
    taught_by = recipe.teacher and recipe.teacher.with_(weights="", cache=None)
    return replace(recipe, data=recipe.data.with_(folder=""), teacher=taught_by)


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
    seeds do.
    """
    S, N = value_SN.shape
    if S == 1:
        return -np.inf, np.inf
    mean = value_SN.mean()
    seeds_R = draw.multinomial(S, np.full(S, 1 / S), size=resamples) @ value_SN.mean(1) / S - mean
    # Images of one value are drawn together.
    value_V, images_V = np.unique(value_SN.sum(0), return_counts=True)
    images_R = draw.multinomial(N, images_V / N, size=resamples) @ value_V / (S * N) - mean
    low, high = np.percentile(mean + student_widening(S) * seeds_R + images_R, (2.5, 97.5))
    return float(low), float(high)
