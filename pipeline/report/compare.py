"""Sets the runs of one study side by side: what each rule cost and how well it did, with ratios to the baseline, BPTT.

Runs that differ in more than the rule and the seed are refused, and nothing is divided across studies or machines: a table of
unlike runs would look the same as this one. A study whose runs are of several machines has a table for each.
"""

from __future__ import annotations

import csv
import io
import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.job import resume_command
from pipeline.recipe_json import listed
from pipeline.report.choose import (
    ComparisonError,
    Finished,
    Unfinished,
    finished_run,
    named,
    newest_study,
    rule_of,
    runs_of_study,
    seed_of,
    study_of,
    unfinished_run,
    with_baseline,
)
from pipeline.report.differences import differences
from pipeline.report.paired import BASELINE, WITHIN
from pipeline.report.runs import ReportError, load, recipe_of
from pipeline.report.study import Group, StudyRun, kind
from pipeline.report.study_run import number, study_run
from pipeline.report.tables import behind_the_rows, machine
from pipeline.track.jsonl import last

__all__ = [
    "Comparison",
    "ComparisonError",
    "Finished",
    "Unfinished",
    "compare",
    "comparisons",
    "print_comparison",
    "print_studies",
]

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
        table = Table(title=title, box=None, header_style="bold", pad_edge=False, title_justify="left")
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
            command = "" if run.state == "running" else f"; {resume_command(run.folder.parent, run.folder.name)}"
            line = f"not in the table: {run.folder.name} ({run.rule}) is {run.state}{command}"
            console.out(line, highlight=False)

    def _behind(self) -> Table:
        about = {"box": None, "header_style": "bold", "pad_edge": False, "title_justify": "left"}
        table = Table(title="behind each row", **about)
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


def compare(
    runs_dir: str | os.PathLike[str],
    names: Sequence[str | os.PathLike[str]] = (),
    *,
    against: str = BASELINE,
    within: float = WITHIN,
) -> Comparison:
    """Compare finished runs.

    Args:
        runs_dir: where runs live.
        names: run names, paths, or study keys (or beginnings of them); none: all of the study whose run finished last. Named
            runs without a run of the baseline among them get those of the same study.
        against: the rule that ratios and differences refer to.
        within: points of accuracy below it that a rule may be, for the verdict on paired seeds.

    Raises:
        ComparisonError: nothing finished, or the runs differ in more than the rule and the seed.
        ReportError: a name that is neither a run nor a study.
    """
    runs_dir = Path(runs_dir)
    folders = named(runs_dir, names) if names else newest_study(runs_dir)
    each = [finished_run(folder) for folder in folders]
    finished = [run for run in each if run is not None]
    left_out = [unfinished_run(folder) for folder, run in zip(folders, each, strict=True) if run is None]
    if not finished:
        raise ComparisonError("compare: no finished run: " + ", ".join(f"{run.folder.name} is {run.state}" for run in left_out))
    finished.sort(key=lambda run: (rule_of(run) != against, rule_of(run), seed_of(run), run.name))
    namesakes: dict[str, Finished] = {}
    for run in finished[1:]:
        for other in (finished[0], namesakes.setdefault(rule_of(run), run)):
            if found := differences(other.folder, run.folder):
                raise ComparisonError(_refusal(other.name, run.name, found))
    notes = []
    if rule_of(finished[0]) != against:
        finished, notes = with_baseline(runs_dir, finished, against)
    notes += [f"{rule} is {written}" for rule, run in namesakes.items() if (written := _written_rule(run)) is not None]
    commits = sorted({str(run.summary.get("commit")) for run in finished})
    if len(commits) > 1:
        notes.append(f"note: the runs are of different commits: {', '.join(commits)}")
    group = Group(tuple(map(_study_run, finished)), against=against, within=within)
    return Comparison(
        study=str(finished[0].summary.get("study", "")),
        runs=tuple(finished),
        unfinished=tuple(left_out),
        notes=(*notes, *_divisions_told(group)),
        group=group,
    )


def print_comparison(
    runs_dir: str | os.PathLike[str],
    names: Sequence[str | os.PathLike[str]] = (),
    *,
    format: str = "table",
    against: str = BASELINE,
    within: float = WITHIN,
    console: Console | None = None,
) -> None:
    """Print `compare` as a table, json or csv; of a whole study a table for each machine that its runs are of."""
    if format not in ("table", "json", "csv"):
        raise ReportError(f"compare: format must be table, json or csv; got {format!r}")
    if format == "table" and (folders := _whole_study(Path(runs_dir), names)):
        print_studies(runs_dir, folders, against=against, within=within, console=console)
        return
    comparison = compare(runs_dir, names, against=against, within=within)
    if format == "table":
        comparison.render(console or Console())
    elif format == "json":
        print(json.dumps(comparison.to_json(), indent=2))
    else:
        sys.stdout.write(comparison.to_csv())


def print_studies(
    runs_dir: str | os.PathLike[str],
    folders: Sequence[Path],
    *,
    against: str = BASELINE,
    within: float = WITHIN,
    console: Console | None = None,
) -> None:
    """A table for each of `comparisons`, one below another."""
    console = console or Console()
    found = comparisons(runs_dir, folders, against=against, within=within)
    for index, comparison in enumerate(found):
        if index:
            console.print()
        comparison.render(console)
    for study, tables in Counter(comparison.study for comparison in found).items():
        if tables > 1:
            told = (
                f"study {study[:8]} has {tables} tables, of different machines or workers: nothing is divided from one to another"
            )
            console.out(told, highlight=False)


def comparisons(
    runs_dir: str | os.PathLike[str], folders: Sequence[Path], *, against: str = BASELINE, within: float = WITHIN
) -> list[Comparison]:
    """Those of the runs that may be compared, by study and machine: runs of another are never divided by one another.

    Raises:
        ComparisonError: nothing of a study finished, or its runs differ in what no study key tells.
    """
    found = [compare(runs_dir, members, against=against, within=within) for members in _comparable(folders)]
    tables = Counter(comparison.study for comparison in found)
    return [
        replace(comparison, where=_where(comparison.group.runs[-1])) if tables[comparison.study] > 1 else comparison
        for comparison in found
    ]


def _comparable(folders: Sequence[Path]) -> list[list[Path]]:
    """By study and machine, in their order; unfinished runs of a machine where nothing finished join the first of their study."""
    groups: dict[str, list[Path]] = {}
    first_of: dict[str, str] = {}
    unfinished: list[Path] = []
    for folder in folders:
        run = finished_run(folder)
        if run is None:
            unfinished.append(folder)
            continue
        key = kind(_study_run(run))
        groups.setdefault(key, []).append(folder)
        first_of.setdefault(study_of(folder), key)
    for folder in unfinished:
        start = last(folder / "journal.jsonl", "start")
        key, study = kind(study_run(folder.name, [start] if start else [], state="interrupted")), study_of(folder)
        groups.setdefault(key if key in groups else first_of.get(study, study), []).append(folder)
    return list(groups.values())


def _whole_study(runs_dir: Path, names: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The runs of the newest study, or of one named by its key; none where runs are named."""
    if not names:
        return newest_study(runs_dir)
    key = os.fspath(names[0])
    is_key = len(names) == 1 and runs_of_study(runs_dir, key) and not (runs_dir / key).exists()
    return named(runs_dir, names) if is_key else []


def _study_run(run: Finished) -> StudyRun:
    return study_run(run.name, (), state="finished", summary=run.summary, recipe=load(run.folder / "recipe.json"))


def _where(run: StudyRun) -> str:
    """`a cpu, 2 cores, 1 thread; 2 workers, each on cores of its own, with 1 loader thread`"""
    counts = [(run.workers, "worker"), (run.loader_threads, "loader thread")]
    workers, threads = (f"{count} {what}{'s' * (count != 1)}" if count is not None else "" for count, what in counts)
    cores = "each on cores of its own" if run.own_cores else ""
    told = ", ".join(filter(None, (workers, cores, threads and f"with {threads}")))
    return "; ".join(filter(None, (machine(run.hardware), told)))


def _written_rule(run: Finished) -> str | None:
    """`SLTT(k=1, rescale=True)`: what the recipe says, where it says more than a name."""
    part = recipe_of(run.folder).get("rule") or {}
    if not part.get("kwargs"):
        return None
    return f"{part['target'].rpartition('.')[2]}({', '.join(f'{name}={value}' for name, value in part['kwargs'].items())})"


def _refusal(a: str, b: str, found: list[tuple[str, Any, Any]]) -> str:
    return f"compare: {a} and {b} differ in more than the rule and the seed: {listed(found)}; name runs that agree"


def _divisions_told(group: Group) -> Iterator[str]:
    """Of seeds with several runs, the faster BPTT, and rules without a seed to divide by."""
    for rule in group.rules:
        for seed, runs in Counter(run.seed for run in group.of(rule)).items():
            if runs > 1:
                yield f"{rule} has {runs} runs of seed {seed}, which count as one, their mean, in ratios and differences"
    if not group.has_baseline:
        return
    if group.fastest_baseline != group.against:
        yield f"images/s and wall clock are divided by {group.fastest_baseline}'s, the faster {group.against}"
        divided = {group.against: "its top-1 and bytes are not divided", group.fastest_baseline: "its times are not divided"}
    else:
        divided = {group.against: "nothing of it is divided"}
    seeds = {rule: {run.seed for run in group.of(rule)} for rule in group.rules}
    for rule in group.rules:
        for base, what in divided.items():
            if not seeds[rule] & seeds[base]:
                yield f"{rule} has no seed in common with {base}, so {what}"


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
