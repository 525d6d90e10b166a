"""The finished runs of a study that may be compared, side by side, as a table or JSON; several such
comparisons as CSV.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.core.printing import Column, has_width, number, print_table, prose, say
from pipeline.core.units import counted, rounded, unit_of
from pipeline.recipe.command_line import how_to_resume
from pipeline.report.choose import Finished, Unfinished, rule_of, seed_of
from pipeline.report.figure import harmless
from pipeline.report.finite import finite, not_finite
from pipeline.report.runs import recipe_of
from pipeline.report.study import (
    COMPUTE,
    ENERGY,
    ENERGY_MEASURED,
    KEPT,
    Group,
    StudyRun,
    measured,
    what_to_change,
)
from pipeline.report.tables import behind_the_rows

_COMPARED = {
    "top1": "top-1",
    "peak_saved_bytes": "peak saved",
    KEPT: "and states",
    "images_per_s": "images/s",
    "wall_s": "wall clock",
    COMPUTE: "compute time",
    ENERGY: "inference energy",
    ENERGY_MEASURED: "inference measured",
}
"""what is compared, as the table calls it"""
_ALWAYS = ("top1", "peak_saved_bytes", "images_per_s", "wall_s")
"""columns of the table, known or not"""
_KINDS = {"peak_saved_bytes": "B", KEPT: "B", COMPUTE: "s", ENERGY: "J", ENERGY_MEASURED: "J"}
_SENTENCES = ("over_time", "evaluated", "tuned")
"""of what is behind a row, what may be several words"""
_FIRST = (
    "run",
    "rule",
    "seed",
    "study",
    "where",
    "recipe",
    "world_size",
    "steps",
    "epochs",
    *_COMPARED,
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The finished runs of a study, baseline first, and what a reader must know beside them."""

    study: str
    runs: tuple[Finished, ...]
    unfinished: tuple[Unfinished, ...]
    notes: tuple[str, ...]
    group: Group
    """the same runs, for what is said of their rules"""
    where: str = ""
    """the machine and its workers, where runs of the study are elsewhere too; they are not in this
    comparison
    """

    @property
    def baseline(self) -> tuple[Finished, ...]:
        """The runs of the rule that the others are compared with; empty when there is none."""
        return self.of(self.group.against)

    def of(self, rule: str) -> tuple[Finished, ...]:
        return tuple(run for run in self.runs if rule_of(run) == rule)

    @property
    def rules(self) -> list[str]:
        return list(dict.fromkeys(map(rule_of, self.runs)))

    def value(self, run: Finished, name: str) -> float | None:
        """A quantity of a run, wall clock without start-up and comparisons of gradients; None: not
        measured.
        """
        written = run.summary.get(name)
        is_nan = isinstance(written, float) and math.isnan(written)
        return written if is_nan else measured(self._measured[run.folder], name)

    def ratio(self, run: Finished, name: str) -> float | None:
        """A quantity of a run over the mean of `group.base_of`'s runs of the same seed; None where
        there are none.
        """
        value, over = measured(self._measured[run.folder], name), self._over[name].get(seed_of(run))
        return None if value is None or not over else value / over

    @cached_property
    def _measured(self) -> dict[Path, StudyRun]:
        return {run.folder: each for run, each in zip(self.runs, self.group.runs, strict=True)}

    @cached_property
    def _over(self) -> dict[str, dict[int, float]]:
        """What each quantity is divided by, by seed."""
        return {name: self.group.by_seed(self.group.base_of(name), name) for name in _COMPARED}

    @cached_property
    def behind(self) -> dict[str, dict[str, str]]:
        """By rule: whose bytes and accuracy (`ratios_to`) and whose time (`time_to`) its own are
        divided by, and the choices that decide such a comparison: `reset_gradient`,
        `norm_statistics`, `precision`, `over_time`, folded or step by step, `micro_batch`, and
        where each rule has a setting of its own, `tuned`."""
        table = behind_the_rows(self.group)
        names = [column.replace(" ", "_").replace("-", "_") for column in table.columns]
        rows = [dict(zip(names, map(str, row), strict=True)) for row in table.rows]
        return {
            row["rule"]: {name: row[name] for name in names if name not in ("rule", "seeds")}
            for row in rows
        }

    def to_json(self) -> dict[str, Any]:
        """`baseline` names its (first) run; each run is its summary, what it keeps with states, its
        compute time, what is `behind` it, and `ratios` to the baseline of its seed, of speed, wall
        clock and compute time to those of `time_baseline`; wall clocks are divided without
        `startup_s` and without what comparing gradients took, `fidelity_s`. JSON has no NaN and no
        infinity: there is null in their place, and `not_finite` of the run says which it was."""
        return {
            "study": self.study,
            "where": self.where or None,
            "baseline": self.baseline[0].name if self.baseline else None,
            "baseline_runs": [run.name for run in self.baseline],
            "time_baseline": self.group.fastest_baseline if self.baseline else None,
            "runs": [
                {
                    **finite(run.summary),
                    "run": run.name,
                    "rule": rule_of(run),
                    **{name: self.value(run, name) for name in (KEPT, COMPUTE)},
                    "behind": self.behind[rule_of(run)],
                    "ratios": {name: self.ratio(run, name) for name in _COMPARED},
                    "not_finite": dict(not_finite(run.summary)),
                }
                for run in self.runs
            ],
            "differences": [
                {**asdict(each), "verdict": each.verdict(self.group.within)}
                for each in self.group.differences
            ],
            "within": self.group.within,
            "unfinished": [run.to_json() for run in self.unfinished],
            "notes": list(self.notes),
        }

    def render(self, console: Console) -> None:
        """One line for each rule, the mean over its runs (± standard deviation), and × the baseline
        over paired seeds; then one with what stands behind it. A rule whose runs all diverged has a
        line that says so."""
        self._print_costs(console)
        console.print()
        self._print_behind(console)
        for note in (
            *(each.text(self.group.within) for each in self.group.differences),
            *self.notes,
        ):
            say(console, note)
        for run in self.unfinished:
            say(
                console,
                _told_of(run, is_here=self._has_lost(run)),
                whole=[how_to_resume(run.folder)],
            )

    def _has_lost(self, run: Unfinished) -> bool:
        """Whether it diverged, trained as these were."""
        return run.state == "diverged" and (run.rule, run.seed) in self.group.diverged_beside

    def _print_costs(self, console: Console) -> None:
        names = [
            name
            for name in _COMPARED
            if name in _ALWAYS or any(self.value(run, name) is not None for run in self.runs)
        ]
        diverged = Counter(run.rule for run in self.unfinished if self._has_lost(run))
        rows = []
        for rule in dict.fromkeys((*self.rules, *diverged)):
            label = _label(rule, finished=len(self.of(rule)), diverged=diverged[rule])
            rows.append(
                (label, *(self._cell(rule, name, in_lines=has_width(console)) for name in names))
            )
        title = f"study {self.study[:8]}" + (f" on {self.where}" if self.where else "")
        print_table(
            console,
            (prose("rule"), *(number(_COMPARED[name]) for name in names)),
            rows,
            title=title,
        )

    def _print_behind(self, console: Console) -> None:
        names = next(iter(self.behind.values()))
        columns = [Column(name.replace("_", " "), wraps=name in _SENTENCES) for name in names]
        rows = [(rule, *told.values()) for rule, told in self.behind.items()]
        print_table(console, ("rule", *columns), rows, title="behind each row")

    def _cell(self, rule: str, name: str, *, in_lines: bool) -> str:
        values = [value for run in self.of(rule) if (value := self.value(run, name)) is not None]
        if not values:
            return "diverged" if name == "top1" and not self.of(rule) else "-"
        mean, ratio = statistics.fmean(values), self.group.ratios(rule, name)
        over = "" if ratio is None else f"\t×{ratio.mean:{'.2f' if ratio.mean >= 0.1 else '.3g'}}"
        spread = (
            "" if len(values) == 1 else f"± {_shown(name, statistics.stdev(values), like=mean)}"
        )
        told = (
            (f"{_shown(name, mean)}{over}", spread)
            if in_lines
            else (f"{_shown(name, mean)} {spread}".rstrip() + over,)
        )
        return "\n".join(filter(None, told))


def csv_of(comparisons: Sequence[Comparison]) -> str:
    """One line for each finished run; nested fields as `hardware.cpu`, ratios as `ratios.top1`,
    what is behind them likewise. `study` and `where` say which comparison it is of.

    As read by a spreadsheet, which must not take a name that begins as a formula for one.
    """
    rows = [
        {**_flat(run), **{name: told[name] for name in ("study", "where", "time_baseline")}}
        for told in (comparison.to_json() for comparison in comparisons)
        for run in told["runs"]
    ]
    rest = sorted({name for row in rows for name in row} - set(_FIRST))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=[*_FIRST, *rest], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: harmless(cell) for name, cell in row.items()} for row in rows)
    return text.getvalue()


def _label(rule: str, *, finished: int, diverged: int) -> str:
    """`SLTT-1 (2 of 3 runs, the other diverged)`"""
    if finished and diverged:
        others = "other" if diverged == 1 else "others"
        return f"{rule} ({finished} of {finished + diverged} runs, the {others} diverged)"
    runs = finished or diverged
    return rule if runs == 1 else f"{rule} ({counted(runs, 'run')})"


def _told_of(run: Unfinished, *, is_here: bool) -> str:
    if run.state == "diverged":
        where = "" if is_here else ", trained otherwise than these"
        advice = f"; {what_to_change(recipe_of(run.folder))}" if is_here else ""
        return (
            f"{run.folder.name} ({run.rule}) diverged{where}: it is in no mean, and nothing is"
            f" divided by it{advice}"
        )
    command = "" if run.state == "running" else f"; {how_to_resume(run.folder)}"
    return f"not in the table: {run.folder.name} ({run.rule}) is {run.state}{command}"


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= (
            _flat(item, f"{prefix}{name}.") if isinstance(item, dict) else {f"{prefix}{name}": item}
        )
    return flat


def _shown(name: str, value: float, *, like: float | None = None) -> str:
    """A quantity with its unit; a spread is written in the unit of the mean that it is `like`."""
    size, digits = (value, 4) if like is None else (like, 2)
    if name == "top1":
        return f"{value:.2%}"
    if name in _KINDS:
        scale, unit = unit_of(_KINDS[name], [size])
        return f"{rounded(value / scale, digits=digits)} {unit}"
    if name == "wall_s":
        if like is None and size >= 3600:
            return f"{int(value // 3600)} h {int(value % 3600 // 60):02d} min"
        return f"{value / 60:.1f} min" if size >= 60 else f"{value:.1f} s"
    return rounded(value, digits=digits)
