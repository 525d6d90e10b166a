"""A factorial study on samples that come in groups (several scenes of one object): accuracy of its cells, and contrasts of them.

    factorial(
        {("fp", "none"): {"0": run, "1": run}, ("1-bit", "none"): {...}, ...},     # a run of each cell for each split of the data
        all_effects({"weights": ("fp", "1-bit"), "teacher": ("none", "kd")}),
        by="object",
    ).render(console)

Splits evaluate on different groups. The accuracy of a cell in a split is its share of right answers, that of a cell the mean over
splits, and a contrast the weighted sum over cells, its weights summing to 0.

The 95 % interval of a contrast is that of a paired bootstrap over groups within splits, widened for there being few of them
(bootstrap.py). It covers which objects happened to be held out: what other objects of the same kind would give with these
trained networks. It covers neither what another seed would have trained, nor the choice of settings. Beside it stands Student's
interval from how much the splits differ, in which all that differs between them is, seeds of training among it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from pipeline.printing import number, print_table, prose, say
from pipeline.report.answered import Answered, read_answered
from pipeline.report.bootstrap import estimated, interval_over_splits, resampled, stretch_of_few, tally
from pipeline.report.runs import ReportError

__all__ = ["Cell", "Contrast", "Factorial", "factorial"]

CellName: TypeAlias = Any
"""text, or a tuple of text; a union would refuse a mapping of either, as the keys of mappings are invariant"""
QUANTILES = (2.5, 97.5)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Accuracies are shares in 0..1."""

    name: CellName
    runs: dict[str, str]
    """of each split"""
    accuracies: dict[str, float]
    """in each split"""

    @property
    def accuracy(self) -> float:
        return sum(self.accuracies.values()) / len(self.accuracies)


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """In points of accuracy, with a 95 % interval over groups."""

    name: str
    weights: dict[CellName, float]
    estimates: dict[str, float]
    """in each split"""
    low: float
    high: float
    over_splits: tuple[float, float] | None
    """Student's interval of the splits' mean; None of one split"""

    @property
    def estimate(self) -> float:
        return sum(self.estimates.values()) / len(self.estimates)

    @property
    def excludes_0(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True)
class Factorial:
    by: str
    groups: dict[str, int]
    """in each split"""
    effective_groups: dict[str, float]
    """in each split: groups of one size that would leave as much uncertainty"""
    samples: dict[str, int]
    """in each split"""
    cells: tuple[Cell, ...]
    contrasts: tuple[Contrast, ...]
    resamples: int
    seed: int
    commits: dict[str, int]
    """that the runs were trained at, with how many runs each"""

    def to_json(self) -> dict[str, Any]:
        return {
            "by": self.by,
            "splits": [
                {"split": s, "groups": self.groups[s], "effective_groups": self.effective_groups[s], "samples": self.samples[s]}
                for s in self.groups
            ],
            "commits": self.commits,
            "resamples": self.resamples,
            "seed": self.seed,
            "cells": [
                {"cell": _text(cell.name), "accuracy": cell.accuracy, "accuracies": cell.accuracies, "runs": cell.runs}
                for cell in self.cells
            ],
            "contrasts": [
                {
                    "contrast": each.name,
                    "points": each.estimate,
                    "points_of_splits": each.estimates,
                    "low": each.low,
                    "high": each.high,
                    "over_splits": each.over_splits,
                    "excludes_0": each.excludes_0,
                    "weights": {_text(name): weight for name, weight in each.weights.items()},
                }
                for each in self.contrasts
            ],
        }

    def render(self, console: Console) -> None:
        """The cells, the contrasts, and what the intervals cover."""
        splits = [number(f"split {split}") for split in self.groups]
        cells = [
            (_text(cell.name), *(f"{share:.2%}" for share in (*cell.accuracies.values(), cell.accuracy))) for cell in self.cells
        ]
        print_table(console, (prose("cell"), *splits, number("mean")), cells)
        contrasts = []
        for each in self.contrasts:
            interval = _interval(each.low, each.high)
            over_splits = "-" if each.over_splits is None else _interval(*each.over_splits)
            verdict = "excludes 0" if each.excludes_0 else "includes 0"
            points = (f"{value:+.2f}" for value in (*each.estimates.values(), each.estimate))
            contrasts.append((each.name, *points, interval, verdict, over_splits))
        console.print()
        titles = ("points", f"95 % over {self.by}s", "", "95 % over splits")
        print_table(console, (prose("contrast"), *splits, *map(number, titles)), contrasts)
        say(
            console,
            f"{_listed(self.groups)} groups by {self.by}, as good as {_listed(self.effective_groups)} of one size, "
            f"{_listed(self.samples)} samples; {self.resamples} resamples of the groups within each split, the same for every "
            f"cell. An interval over {self.by}s covers which of them were held out, not the randomness of training, which one "
            "over splits covers too; neither covers the choice of settings. "
            f"Trained at {', '.join(f'{commit} ({runs} runs)' for commit, runs in self.commits.items())}.",
        )


def factorial(
    cells: Mapping[CellName, Mapping[str, Path]],
    contrasts: Mapping[str, Mapping[CellName, float]],
    *,
    by: str,
    resamples: int = 10_000,
    seed: int = 0,
    trust: Collection[str] = (),
) -> Factorial:
    """Read the runs and resample them.

    Args:
        cells: of each cell its run for each split; a run is a folder with `answers.npz` and `recipe.json`.
        contrasts: of each contrast its cells' weights, see effects.py.
        by: what groups the samples, as `Beton.groups` takes it.
        resamples, seed: of the bootstrap.
        trust: packages that the runs' recipes may name, beside the product's own.

    Raises:
        ReportError: a split that a cell lacks, runs of one split on different samples, splits that share a group, fewer than two
            groups, or a contrast that is none.
        ValueError: a run that cannot be read, or whose data has no such groups.
    """
    splits = _splits(cells)
    _check_contrasts(contrasts, cells)
    if resamples < 1:
        raise ReportError(f"factorial: resamples must be 1 or more; got {resamples}")
    runs = {split: {name: read_answered(cells[name][split], by=by, trust=trust) for name in cells} for split in splits}
    groups = {split: _group_N(split, list(of_split.values())) for split, of_split in runs.items()}
    _check_groups(groups, by)
    everyone = [run for of_split in runs.values() for run in of_split.values()]
    _check_workers(everyone)
    tallies = [
        tally(groups[split], np.stack([run.answers.right for run in of_split.values()], axis=1))
        for split, of_split in runs.items()
    ]
    weights_CK = np.array([[weights.get(name, 0.0) for weights in contrasts.values()] for name in cells]).reshape(len(cells), -1)
    points_SK = 100 * estimated(tallies, weights_CK)
    quantiles_2K = np.percentile(100 * resampled(tallies, weights_CK, resamples=resamples, seed=seed), QUANTILES, axis=0)
    points_K = points_SK.mean(0)
    low_K, high_K = points_K + stretch_of_few(tallies) * (quantiles_2K - points_K)
    return Factorial(
        by=by,
        groups={split: len(np.unique(group_N)) for split, group_N in groups.items()},
        effective_groups={split: each.effective_groups for split, each in zip(splits, tallies, strict=True)},
        samples={split: len(group_N) for split, group_N in groups.items()},
        cells=tuple(_cell(name, {split: of_split[name] for split, of_split in runs.items()}) for name in cells),
        contrasts=tuple(
            Contrast(
                name=name,
                weights=dict(weights),
                estimates=dict(zip(splits, points_S.tolist(), strict=True)),
                low=float(low),
                high=float(high),
                over_splits=interval_over_splits(points_S),
            )
            for (name, weights), points_S, low, high in zip(contrasts.items(), points_SK.T, low_K, high_K, strict=True)
        ),
        resamples=resamples,
        seed=seed,
        commits=dict(Counter(", ".join(run.commits) for run in everyone)),
    )


def _cell(name: CellName, runs: Mapping[str, Answered]) -> Cell:
    return Cell(
        name=name,
        runs={split: run.name for split, run in runs.items()},
        accuracies={split: float(run.answers.right.mean()) for split, run in runs.items()},
    )


# ------------------------------------------------------------------------------------------------------------------- refusals


def _splits(cells: Mapping[CellName, Mapping[str, Path]]) -> list[str]:
    splits = list(dict.fromkeys(split for runs in cells.values() for split in runs))
    if not splits:
        raise ReportError(f"factorial: needs a run for each cell and split; got {len(cells)} cells without runs")
    for name, runs in cells.items():
        if missing := [split for split in splits if split not in runs]:
            known = ", ".join(splits)
            raise ReportError(
                f"factorial: every cell must have a run of each split, {known}; {_text(name)} has none of {missing[0]}"
            )
    return splits


def _check_contrasts(contrasts: Mapping[str, Mapping[CellName, float]], cells: Mapping[CellName, Any]) -> None:
    for name, weights in contrasts.items():
        if unknown := [_text(cell) for cell in weights if cell not in cells]:
            accepted = "; ".join(map(_text, cells))
            raise ReportError(f"factorial: {name} must weigh cells of the study; got {'; '.join(unknown)}; there are {accepted}")
        total = math.fsum(weights.values())
        if not abs(total) < 1e-9 or not any(weights.values()):  # also where one of them is not a number
            raise ReportError(f"factorial: the weights of {name} must sum to 0, some of them not 0; they sum to {total:g}")


def _group_N(split: str, runs: list[Answered]) -> NDArray[Any]:
    """What the samples of a split belong with: of one run, once all of them are found to have the same."""
    for run in runs[1:]:
        if said := runs[0].differs_from(run):
            raise ReportError(
                f"factorial: all runs of a split must be evaluated on the same samples; in split {split} "
                f"{runs[0].name} and {run.name} have {said}"
            )
    return runs[0].group_N


def _check_workers(runs: list[Answered]) -> None:
    for run in runs[1:]:
        if run.workers != runs[0].workers:
            raise ReportError(
                "factorial: all runs must be trained by as many workers, among which batch norms divide a batch; "
                f"{runs[0].name} was by {runs[0].workers}, {run.name} by {run.workers}"
            )


def _check_groups(groups: Mapping[str, NDArray[Any]], by: str) -> None:
    seen: dict[str, str] = {}
    for split, group_N in groups.items():
        found = np.unique(group_N).tolist()
        if len(found) < 2:
            raise ReportError(f"factorial: split {split} must have two groups or more by {by!r}; it has {len(found)}")
        for group in found:
            if (other := seen.setdefault(group, split)) != split:
                raise ReportError(f"factorial: splits must evaluate on different groups; {other} and {split} both have {group!r}")


# ----------------------------------------------------------------------------------------------------------------------- text


def _text(name: CellName) -> str:
    return name if isinstance(name, str) else ", ".join(map(str, name))


def _interval(low: float, high: float) -> str:
    return f"{low:+.2f} to {high:+.2f}"


def _listed(numbers: Mapping[str, float]) -> str:
    return " + ".join(f"{number:.0f}" for number in numbers.values())
