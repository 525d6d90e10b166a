"""The finished runs of a study that may be compared, side by side: as a table, JSON, or CSV."""

from __future__ import annotations

import csv
import io
import statistics
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.report.choose import Finished, Unfinished, rule_of, seed_of
from pipeline.report.resuming import how_to_resume
from pipeline.report.study import Group
from pipeline.report.study_run import number
from pipeline.report.tables import behind_the_rows

_COMPARED = ("top1", "peak_saved_bytes", "images_per_s", "wall_s")
_FIRST = ("run", "rule", "seed", "study", "recipe", "world_size", "steps", "epochs", *_COMPARED)


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
    """the machine and its workers, where runs of the study are elsewhere too; they are not in this comparison"""

    @property
    def baseline(self) -> tuple[Finished, ...]:
        """The runs of the rule that the others are compared with; empty when there is none."""
        return self.of(self.group.against)

    def of(self, rule: str) -> tuple[Finished, ...]:
        return tuple(run for run in self.runs if rule_of(run) == rule)

    @property
    def rules(self) -> list[str]:
        return list(dict.fromkeys(map(rule_of, self.runs)))

    def ratio(self, run: Finished, name: str) -> float | None:
        """A quantity of a run over the mean of `group.base_of`'s runs of the same seed; None where there are none."""
        value, over = number(run.summary.get(name)), self._over[name].get(seed_of(run))
        return None if value is None or not over else value / over

    @cached_property
    def _over(self) -> dict[str, dict[int, float]]:
        """What each quantity is divided by, by seed."""
        return {name: self.group.by_seed(self.group.base_of(name), name) for name in _COMPARED}

    @cached_property
    def behind(self) -> dict[str, dict[str, str]]:
        """By rule: whose bytes and accuracy (`ratios_to`) and whose time (`time_to`) its own are divided by, and the choices that
        decide such a comparison: `reset_gradient`, `norm_statistics`, `precision`, and `over_time`, folded or step by step."""
        table = behind_the_rows(self.group)
        names = [column.replace(" ", "_") for column in table.columns]
        rows = [dict(zip(names, map(str, row), strict=True)) for row in table.rows]
        return {row["rule"]: {name: row[name] for name in names if name not in ("rule", "seeds")} for row in rows}

    def to_json(self) -> dict[str, Any]:
        """`baseline` names its (first) run; each run is its summary, what is `behind` it, and `ratios` to the baseline of its
        seed, speed and wall clock to those of `time_baseline`."""
        return {
            "study": self.study,
            "where": self.where or None,
            "baseline": self.baseline[0].name if self.baseline else None,
            "baseline_runs": [run.name for run in self.baseline],
            "time_baseline": self.group.fastest_baseline if self.baseline else None,
            "runs": [
                {
                    **run.summary,
                    "run": run.name,
                    "behind": self.behind[rule_of(run)],
                    "ratios": {name: self.ratio(run, name) for name in _COMPARED},
                }
                for run in self.runs
            ],
            "differences": [{**asdict(each), "verdict": each.verdict(self.group.within)} for each in self.group.differences],
            "within": self.group.within,
            "unfinished": [{"run": run.folder.name, "rule": run.rule, "state": run.state} for run in self.unfinished],
            "notes": list(self.notes),
        }

    def to_csv(self) -> str:
        """One line for each run; nested fields as `hardware.cpu`, ratios as `ratios.top1`, what is behind them likewise."""
        told = self.to_json()
        rows = [{**_flat(run), "time_baseline": told["time_baseline"]} for run in told["runs"]]
        rest = sorted({name for row in rows for name in row} - set(_FIRST))
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=[*_FIRST, *rest], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def render(self, console: Console) -> None:
        """One line for each rule, the mean over its runs (± standard deviation), and × the baseline over paired seeds; then one
        with what stands behind it."""
        title = f"study {self.study[:8]}" + (f" on {self.where}" if self.where else "")
        table = _table(title)
        table.add_column("rule", overflow="fold")
        for title in ("top-1", "peak saved", "images/s", "wall clock"):
            table.add_column(title, justify="right")
        for rule in self.rules:
            runs = self.of(rule)
            label = rule if len(runs) == 1 else f"{rule} ({len(runs)} runs)"
            table.add_row(Text(label), *(Text(self._cell(rule, name)) for name in _COMPARED))
        console.print(table)
        console.print()
        console.print(self._behind())
        for note in (*(each.text(self.group.within) for each in self.group.differences), *self.notes):
            console.out(note, highlight=False)
        for run in self.unfinished:
            command = "" if run.state == "running" else f"; {how_to_resume(run.folder)}"
            line = f"not in the table: {run.folder.name} ({run.rule}) is {run.state}{command}"
            console.out(line, highlight=False)

    def _behind(self) -> Table:
        table = _table("behind each row")
        for name in ("rule", *next(iter(self.behind.values()))):
            table.add_column(name.replace("_", "\n") if len(name) > 10 else name.replace("_", " "), overflow="fold")
        for rule, told in self.behind.items():
            table.add_row(Text(rule), *map(Text, told.values()))
        return table

    def _cell(self, rule: str, name: str) -> str:
        values = [value for run in self.of(rule) if (value := _value(run, name)) is not None]
        if not values:
            return "-"
        mean, ratio = statistics.fmean(values), self.group.ratios(rule, name)
        text = _shown(name, mean)
        if ratio is not None:
            text += f"  ×{ratio.mean:{'.2f' if ratio.mean >= 0.1 else '.3g'}}"
        return text if len(values) == 1 else f"{text}\n± {_shown(name, statistics.stdev(values), like=mean)}"


def _table(title: str) -> Table:
    return Table(title=title, box=None, header_style="bold", pad_edge=False, title_justify="left")


def _value(run: Finished, name: str) -> float | None:
    value = run.summary.get(name)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, dict) else {f"{prefix}{name}": item}
    return flat


def _shown(name: str, value: float, *, like: float | None = None) -> str:
    """A quantity with its unit; a spread is written in the unit of the mean that it is `like`."""
    size, digits = (value, 4) if like is None else (like, 2)
    if name == "top1":
        return f"{value:.2%}"
    if name == "peak_saved_bytes":
        scale, unit = next(pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if size >= pair[0] or pair[0] == 1)
        return f"{value / scale:.{digits}g} {unit}"
    if name == "wall_s":
        if like is None and size >= 3600:
            return f"{int(value // 3600)} h {int(value % 3600 // 60):02d} min"
        return f"{value / 60:.1f} min" if size >= 60 else f"{value:.1f} s"
    return f"{value:.{digits}g}"
