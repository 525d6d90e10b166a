"""`spiketrain compare`: the rules of one study side by side, with ratios to the baseline, BPTT.

Runs that differ in more than the rule and the seed are refused. No value is divided by that of
another study or machine. A study has one comparison per set of training conditions, such as machine
and workers.
"""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from pipeline.core.printing import Column, has_width, new_console, number, print_table, prose, say
from pipeline.core.units import counted
from pipeline.recipe import BASELINE
from pipeline.recipe.suite import how_to_resume
from pipeline.report import tables
from pipeline.report.drawing import Table
from pipeline.report.metrics import compared_metrics
from pipeline.report.results import (
    ReportError,
    Run,
    comparison_key,
    describe_conditions,
    flat,
    read_run,
    read_runs,
    refuse_damage,
)
from pipeline.report.selection import (
    refuse_unlike,
    select_runs,
    with_baseline,
)
from pipeline.report.study import WITHIN, Group, place

_SENTENCES = ("over time", "evaluated", "tuned")  # columns whose values may be several words
_FIRST = ("run", "rule", "seed", "study", "where", "recipe", "world_size", "steps", "epochs")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs of a study that may be compared, with notes for the reader."""

    group: Group
    elsewhere: tuple[Run, ...] = ()  # unfinished runs of another study or under other conditions
    notes: tuple[str, ...] = ()
    where: str = ""  # the conditions, for a study with several comparisons

    @property
    def unfinished(self) -> tuple[Run, ...]:
        return (*(run for run in self.group.runs if not run.is_finished), *self.elsewhere)

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON values.

        `baseline` is the name of the baseline's first run. Each run has the fields of its summary,
        the metrics that the summary lacks, `behind` with the conditions of its rule, and `ratios`
        to the baseline with the same seed. Speed and time are divided by those of `time_baseline`.
        Wall clocks are divided without `startup_s` and `fidelity_s`. Numbers that are not finite
        are null, and `not_finite` lists them.
        """
        group = self.group
        baseline = [run.name for run in group.of(group.against) if run.is_finished]
        base_values = {
            each.name: group.by_seed(group.base_of(each.name), each.name)
            for each in compared_metrics()
        }
        behind = {rule: tables.conditions_of_rule(group, rule) for rule in group.finished_rules}
        return {
            "study": group.study,
            "where": self.where or None,
            "baseline": baseline[0] if baseline else None,
            "baseline_runs": baseline,
            "time_baseline": group.fastest_baseline if baseline else None,
            "runs": [_run_to_json(run, base_values, behind[run.rule]) for run in group.finished],
            "differences": [
                {**asdict(each), "verdict": each.verdict(group.within)}
                for each in group.differences
            ],
            "within": group.within,
            "unfinished": [unfinished_to_json(run) for run in self.unfinished],
            "notes": list(self.notes),
        }

    def render(self, console: Console) -> None:
        """Print the costs, the conditions of each rule, the notes, and the answer.

        Each rule has one line: the mean over its runs ± the standard deviation, and × the ratio
        to the baseline over paired seeds. If all runs of a rule diverged, its line says so.
        """
        self._print_costs(console)
        console.print()
        conditions = {
            rule: tables.conditions_of_rule(self.group, rule) for rule in self.group.finished_rules
        }
        columns = [
            Column(name, wraps=name in _SENTENCES) for name in next(iter(conditions.values()))
        ]
        rows = [(rule, *values.values()) for rule, values in conditions.items()]
        print_table(console, ("rule", *columns), rows, title="conditions of each rule")
        differences = (each.text(self.group.within) for each in self.group.differences)
        for note in (*differences, *self.notes):
            say(console, note, label="- ")
        for run in self.unfinished:
            label, resume = f"{run.name} ({run.rule})", how_to_resume(run.folder)
            if run.state != "diverged":
                command = "" if run.state == "running" else f"; {resume}"
                say(
                    console,
                    f"not in the table: {label} is {tables.state_of(run)}{command}",
                    whole=[resume],
                )
            elif run in self.elsewhere:  # a note names the other diverged runs
                say(console, f"not in the table: {label} diverged under other conditions")
        if answer := tables.conclusion(self.group):
            console.print()
            say(console, answer, style="bold")

    def _print_costs(self, console: Console) -> None:
        group, rows = self.group, []
        metrics = tables.columns_of_costs(group)
        finished = Counter(run.rule for run in group.finished)
        diverged = Counter(run.rule for run in group.runs if run.state == "diverged")
        for rule in finished | diverged:
            runs, lost, label = finished[rule] + diverged[rule], diverged[rule], rule
            if finished[rule] and lost:
                label = f"{rule} ({finished[rule]} of {counted(runs, 'run')}, {lost} diverged)"
            elif runs > 1:
                label = f"{rule} ({counted(runs, 'run')})"
            cells = [_cell(tables.format_metric(group, rule, each), console) for each in metrics]
            rows.append((label, cells[0] if finished[rule] else "diverged", *cells[1:]))
        title = f"study {group.study[:8]}" + (f" on {self.where}" if self.where else "")
        columns = (prose("rule"), *(number(each.title) for each in metrics))
        print_table(console, columns, rows, title=title)


def comparisons(runs_dir: str | os.PathLike[str], folders: Iterable[Path]) -> list[Comparison]:
    """Compare runs with BPTT, grouped by study and conditions (see `comparable`).

    Raises:
        ReportError: no run of a study finished, its runs differ in more than the rule and the
            seed, or a file of a run is damaged.
    """
    compared_groups, refusals = _compare_each(
        read_runs(Path(runs_dir)), list(map(read_run, folders)), BASELINE, WITHIN
    )
    if refusals:
        raise refusals[0]
    return compared_groups


def print_comparison(
    runs_dir: str | os.PathLike[str],
    names: Sequence[str | os.PathLike[str]] = (),
    *,
    folders: Iterable[Path] | None = None,
    format: Literal["table", "json", "csv"] = "table",
    against: str = BASELINE,
    within: float = WITHIN,
    console: Console | None = None,
) -> None:
    """Print the comparison of the named runs.

    Without names, with `folders`, or with one study key as the only name, print one comparison per
    study and conditions.

    An error about some of the runs is raised after the other comparisons are printed.

    Args:
        runs_dir: the folder of runs.
        names: run names, paths or study keys; prefixes of names and keys suffice. Without names,
            the study with the newest finished run is compared. For named runs, missing forms
            of the baseline are added from the same study (see `with_baseline`).
        folders: the folders of the compared runs; None: `names` select the runs.
        format: "table" prints tables on the console; "json" prints a list of comparisons; "csv"
            prints one line per finished run.
        against: the rule that ratios and differences refer to.
        within: the tolerated loss in points of accuracy, for the verdict on paired seeds.

    Raises:
        ReportError: no run finished; the runs differ in more than the rule and the seed; a file of
            a run is damaged; or a name matches no run and no study, or several.
    """
    runs_dir, console = Path(runs_dir), console or new_console()
    runs = read_runs(runs_dir)
    members = select_runs(runs_dir, names, runs) if folders is None else [*map(read_run, folders)]
    key = os.fspath(names[0]) if len(names) == 1 else ""
    is_key = key != "" and any(run.study.startswith(key) for run in runs)
    if not names or (is_key and not (runs_dir / key).exists()):
        compared_groups, refusals = _compare_each(runs, members, against, within)
    else:
        refusals = []
        compared_groups = [comparison_of(runs, members, against, within, is_whole=False)]
    if format == "table":
        _print_tables(compared_groups, console)
    elif compared_groups or not refusals:
        values = [each.to_json() for each in compared_groups]
        if format == "csv":
            sys.stdout.write(csv_of(values))
        else:
            print(json.dumps(values, indent=2, allow_nan=False))
    if refusals:
        raise refusals[0]


def _print_tables(comparisons: Sequence[Comparison], console: Console) -> None:
    for index, comparison in enumerate(comparisons):
        if index:
            console.print()
        comparison.render(console)
    for study, count in Counter(each.group.study for each in comparisons).items():
        if count > 1:
            say(
                console,
                f"study {study[:8]} has {count} tables for different training conditions: no table"
                " has ratios to another table",
            )


def comparable(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs by study and conditions (`comparison_key`), in the order of the runs.

    An unfinished run joins the first group of its study if no finished run has its conditions.
    """
    finished = [run for run in runs if run.is_finished]
    groups: dict[str, list[Run]] = {comparison_key(run): [] for run in finished}
    first_of = {run.study: comparison_key(run) for run in reversed(finished)}
    for run in (*finished, *(run for run in runs if not run.is_finished)):
        key = (
            comparison_key(run)
            if comparison_key(run) in groups
            else first_of.get(run.study, run.study)
        )
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def unfinished_to_json(run: Run) -> dict[str, str]:
    return {"run": run.name, "rule": run.rule, "state": tables.state_of(run)}


def _run_to_json(
    run: Run, base_values: Mapping[str, Mapping[int, float]], behind: Mapping[str, str]
) -> dict[str, Any]:
    """`base_values`: the baseline's values by metric and seed."""
    summary = dict(run.summary or {})
    values = {name: run.value(name) for name in base_values}
    ratios: dict[str, float | None] = dict.fromkeys(values)
    for name, value in values.items():
        if value is not None and (base := base_values[name].get(run.seed)):
            ratios[name] = value / base
    return {
        **{each.name: values[each.name] for each in compared_metrics() if each.source},
        **finite(summary),
        "run": run.name,
        "rule": run.rule,
        "behind": {re.sub("[ -]", "_", name): value for name, value in behind.items()},
        "ratios": ratios,
        "not_finite": {
            name: str(value) for name, value in flat(summary).items() if finite(value) != value
        },
    }


def csv_of(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """One line for each finished run, from the JSON values of comparisons.

    Nested fields have names such as `hardware.cpu`.
    """
    rows = [
        {**flat(run), **{name: each[name] for name in ("study", "where", "time_baseline")}}
        for each in comparisons
        for run in each["runs"]
    ]
    first = (*_FIRST, *(each.name for each in compared_metrics()))
    columns = (*first, *sorted({name for row in rows for name in row} - set(first)))
    return Table(
        columns=columns, rows=tuple(tuple(row.get(name) for name in columns) for row in rows)
    ).to_csv()


def finite(value: Any) -> Any:
    """JSON values with None in place of NaN and infinities."""
    return json.loads(json.dumps(value), parse_constant=lambda constant: None)


def comparison_of(
    runs: Sequence[Run], members: Sequence[Run], against: str, within: float, *, is_whole: bool
) -> Comparison:
    """Compare the members.

    Args:
        runs: all runs of the folder; missing baselines are added from them.
        is_whole: whether the members are a whole group of `comparable`. If not, or if no finished
            member has the rule `against`, missing baselines are added.

    Raises:
        ReportError: no member finished, members differ in more than the rule and the seed, or a
            file of a member is damaged.
    """
    for run in members:
        refuse_damage(run)
    others = [run for run in members if not run.is_finished]
    finished = [run for run in members if run.is_finished]
    finished.sort(key=lambda run: place(run, against))
    if not finished:
        raise ReportError(
            "compare: no finished run: "
            + ", ".join(f"{run.name} is {tables.state_of(run)}" for run in others)
        )
    refuse_unlike(finished)
    notes: list[str] = []
    if finished[0].rule != against or not is_whole:
        finished, notes = with_baseline(runs, finished, against)
    unfinished = [run for run in others if comparison_key(run) == comparison_key(finished[0])]
    group = Group((*finished, *unfinished), against, within)
    return Comparison(
        group=group,
        elsewhere=tuple(run for run in others if run not in unfinished),
        notes=(*notes, *group.notes),
    )


def _compare_each(
    runs: Sequence[Run], members: Sequence[Run], against: str, within: float
) -> tuple[list[Comparison], list[ReportError]]:
    comparisons: list[Comparison] = []
    refusals: list[ReportError] = []
    for runs_of_group in comparable(members):
        try:
            comparisons.append(comparison_of(runs, runs_of_group, against, within, is_whole=True))
        except ReportError as error:
            refusals.append(error)
    counts = Counter(each.group.study for each in comparisons)
    for index, each in enumerate(comparisons):
        if counts[each.group.study] > 1:
            comparisons[index] = replace(
                each,
                where=describe_conditions(
                    each.group.finished[-1], between="; ", names_loaders=True
                ),
            )
    return comparisons, refusals


def _cell(shown: tables.Shown | None, console: Console) -> str:
    """Format a cell. In a terminal, the deviation is below the mean and the ratio."""
    if shown is None:
        return "-"
    ratio = f"\t{shown.ratio}" if shown.ratio else ""
    if has_width(console):
        return f"{shown.mean}{ratio}\n{shown.spread}".rstrip()
    return f"{shown.mean} {shown.spread}".rstrip() + ratio
