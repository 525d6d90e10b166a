"""Effects in a factorial study whose evaluation samples come in groups, with intervals over the
groups.

Each split of the data evaluates on its own groups. The accuracy of a cell is its mean over splits.
A contrast is a weighted sum of cells whose weights sum to 0, in points of accuracy. The effect of m
of k factors with two levels weighs a cell by

    w = s_1 ... s_m / 2^(k - m),      s = +1 at a factor's second level, -1 at its first

so an interaction is a difference of differences. One resample draws, within each split, as many
groups as it has, with replacement, and judges every cell on the same draw:

    value = sum_c w[c] mean_s (sum_g m[s,g] right[s,g,c] / sum_g m[s,g] samples[s,g])

The 95 % interval over groups covers which groups were held out, not the randomness of training. The
percentiles are widened, because resamples of G groups vary less than groups do, by 1 - 1/G, and
Student's quantile is due. G is the effective number of groups (Kish 1965). Student's interval over
splits covers everything that differs between splits, other seeds of training included.

Sources: Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch. 13; Davison & Hinkley 1997,
Bootstrap Methods and their Application, ch. 3; Hesterberg 2014, arXiv:1411.5279.
"""

# C cells, G groups of a split, K contrasts, R resamples

import itertools
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from scipy import stats

from pipeline.core.printing import number, print_table, prose, say
from pipeline.recipe import Recipe
from pipeline.recipe.json import read_json
from pipeline.train.evaluation import read_predictions

Levels = tuple[str, str]
Weights = dict[tuple[str, ...], float]


def effect(factors: Mapping[str, Levels], *of: str, at: Mapping[str, str] | None = None) -> Weights:
    """Weights of the cells for the effect of one factor, or the interaction of several.

    `at`: levels of other factors; only the cells at these levels are used.
    """
    at = at or {}
    weights = {}
    for cell in itertools.product(*factors.values()):
        level = dict(zip(factors, cell, strict=True))
        if all(level[name] == wanted for name, wanted in at.items()):
            signs = (1 if level[name] == factors[name][1] else -1 for name in of)
            weights[cell] = math.prod(signs) / 2 ** (len(factors) - len(of) - len(at))
    return weights


def all_effects(factors: Mapping[str, Levels]) -> dict[str, Weights]:
    """Main effects, named `weights (1-bit - full)`, then interactions, named `weights x
    teacher`.
    """
    effects = {}
    for count in range(1, len(factors) + 1):
        for of in itertools.combinations(factors, count):
            first, second = factors[of[0]]
            name = " x ".join(of) if count > 1 else f"{of[0]} ({second} - {first})"
            effects[name] = effect(factors, *of)
    return effects


@dataclass(frozen=True, kw_only=True)
class Factorial:
    """The tables of one study. Accuracies are in percent, contrasts in points."""

    cells: pd.DataFrame
    """a row per cell; columns: one per split, `mean`"""
    contrasts: pd.DataFrame
    """a row per contrast; columns: one per split, `points`, `low`, `high`, `splits_low`,
    `splits_high`
    """
    sizes: pd.DataFrame
    """a row per split; columns: `groups`, `effective`, `samples`"""

    def to_dict(self) -> dict[str, Any]:
        """Each table as rows that JSON can hold."""
        tables = {"cells": self.cells, "contrasts": self.contrasts, "splits": self.sizes}
        return {name: table.reset_index().to_dict("records") for name, table in tables.items()}

    def render(self, console: Console, *, by: str) -> None:
        splits = list(self.sizes.index)
        columns = [number(f"split {split}") for split in splits]
        cells = [
            (name, *(f"{share:.2f}%" for share in row))
            for name, row in zip(self.cells.index, self.cells.to_numpy(), strict=True)
        ]
        print_table(console, (prose("cell"), *columns, number("mean")), cells)
        rows = []
        for name, row in self.contrasts.to_dict("index").items():
            points = (f"{row[column]:+.2f}" for column in (*splits, "points"))
            over_groups = f"{row['low']:+.2f} to {row['high']:+.2f}"
            verdict = "includes 0" if row["low"] <= 0 <= row["high"] else "excludes 0"
            over_splits = f"{row['splits_low']:+.2f} to {row['splits_high']:+.2f}"
            rows.append((str(name), *points, over_groups, verdict, over_splits))
        console.print()
        titles = ("points", f"95 % over {by}s", "", "95 % over splits")
        print_table(console, (prose("contrast"), *columns, *map(number, titles)), rows)
        listed = {
            name: " + ".join(f"{each:.0f}" for each in self.sizes[name]) for name in self.sizes
        }
        say(
            console,
            f"{listed['groups']} groups by {by}, as good as {listed['effective']} of one size, "
            f"{listed['samples']} samples. An interval over {by}s does not cover the randomness of "
            "training; an interval over splits does. Neither covers the choice of settings.",
        )


def factorial(
    right: Mapping[str, pd.DataFrame],
    contrasts: Mapping[str, Weights],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Factorial:
    """Tables of a study.

    Args:
        right: for each split a frame with a row per sample, indexed by its group, and a column of
            True and False per cell, named by its levels: "1-bit, block, labels".
        contrasts: the weights of each contrast's cells.
    """
    draw = np.random.default_rng(seed)
    cells = list(next(iter(right.values())).columns)
    weights = {
        name: {cell_name(cell): w for cell, w in of.items()} for name, of in contrasts.items()
    }
    weights_CK = np.array([[of.get(cell, 0.0) for of in weights.values()] for cell in cells])
    values, resampled, sizes = {}, [], {}
    for split, frame in right.items():
        by_group: Any = frame.groupby(level=0)
        samples_G = by_group.size().to_numpy(np.float64)
        # Cells are subtracted while they are whole numbers: the difference of equal cells is
        # exactly 0.
        right_GK = by_group.sum().to_numpy(np.float64) @ weights_CK
        values[split] = 100 * right_GK.sum(0) / samples_G.sum()
        G = len(samples_G)
        drawn_RG = draw.multinomial(G, np.full(G, 1 / G), size=resamples).astype(np.float64)
        resampled.append(100 * (drawn_RG @ right_GK) / (drawn_RG @ samples_G)[:, None])
        effective = samples_G.sum() ** 2 / (samples_G**2).sum()
        sizes[split] = {"groups": G, "effective": effective, "samples": len(frame)}
    table = pd.DataFrame(values, index=pd.Index(contrasts, name="contrast"))
    points = table.mean(axis=1)
    quantiles_2K = np.percentile(np.mean(resampled, axis=0), (2.5, 97.5), axis=0)
    by_split = pd.DataFrame.from_dict(sizes, orient="index").rename_axis("split")
    low, high = points.to_numpy() + student_widening(by_split["effective"]) * (
        quantiles_2K - points.to_numpy()
    )
    half = stats.t.ppf(0.975, len(values) - 1) * table.sem(axis=1)
    shares = pd.DataFrame({split: 100 * frame.mean() for split, frame in right.items()})
    return Factorial(
        cells=shares.rename_axis("cell").assign(mean=shares.mean(axis=1)),
        contrasts=table.assign(
            points=points, low=low, high=high, splits_low=points - half, splits_high=points + half
        ),
        sizes=by_split,
    )


def student_widening(groups: Any) -> float:
    """The factor on percentiles of resamples of few groups, from the effective groups of each
    split.
    """
    groups = np.atleast_1d(groups)
    student = stats.t.ppf(0.975, (groups - 1).sum()) / stats.norm.ppf(0.975)
    return float(student / np.sqrt((1 - 1 / groups).mean()))


def read_right(
    cells: Mapping[tuple[str, ...], Mapping[str, Path]], *, by: str, trust: Collection[str] = ()
) -> dict[str, pd.DataFrame]:
    """Which samples the run of each cell and split answered right, as `factorial` takes them.

    Raises: ValueError for runs of one split that were evaluated on different samples, splits that
        share a group, or runs that were trained by different numbers of workers.
    """
    everyone = [run for runs in cells.values() for run in runs.values()]
    right: dict[str, pd.DataFrame] = {}
    for split in next(iter(cells.values())):
        columns = {
            cell_name(cell): _read_run(runs[split], by=by, trust=trust)
            for cell, runs in cells.items()
        }
        first, *others = columns.values()
        if not all(column.index.equals(first.index) for column in others):
            raise ValueError(
                "factorial: all runs of a split must be evaluated on the same samples; split"
                f" {split}'s were not"
            )
        right[split] = pd.DataFrame(columns).droplevel(["content", "index", "target"])
    groups = Counter(group for frame in right.values() for group in frame.index.unique())
    if shared := [group for group, splits in groups.items() if splits > 1]:
        raise ValueError(
            f"factorial: splits must evaluate on different groups; got {shared[0]!r} in several"
        )
    # Batch norms divide a batch among the workers.
    workers = {int(read_json(run / "summary.json")["world_size"]) for run in everyone}
    if len(workers) > 1:
        raise ValueError(
            f"factorial: all runs must be trained by as many workers; got {sorted(workers)}"
        )
    return right


def cell_name(cell: tuple[str, ...]) -> str:
    return ", ".join(cell)


def _read_run(run: Path, *, by: str, trust: Collection[str]) -> pd.Series:
    """True for each sample that a finished run answered right, indexed by what the sample is."""
    if not (run / "summary.json").exists():
        raise ValueError(f"factorial: {run.name} must have finished; it has no summary.json")
    predictions = read_predictions(run / "answers.npz")
    data = Recipe.read(run / "recipe.json", trust=trust).data.build()
    content, evaluated = data.fingerprint(), read_json(run / "summary.json")["data_fingerprint"]
    if content != evaluated:
        raise ValueError(
            f"factorial: {run.name} was evaluated on content {evaluated[:12]}; its data now has"
            f" {content[:12]}"
        )
    groups = np.array(data.groups("val", by=by))[predictions.index]
    levels = [groups, np.full(len(groups), content), predictions.index, predictions.target]
    return pd.Series(
        predictions.is_correct,
        pd.MultiIndex.from_arrays(levels, names=["group", "content", "index", "target"]),
    )
