"""The runs of a folder: select some by name or study key, find what they compare with, list all."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from pipeline.core.printing import new_console, number, print_table, say
from pipeline.core.run_folder import RunFolder
from pipeline.core.units import counted, first_few
from pipeline.recipe import is_baseline
from pipeline.recipe.json import differing, listed
from pipeline.recipe.printed_commands import how_to_resume
from pipeline.recipe.recipe import Role, select
from pipeline.recipe.suite import FILE, is_suite
from pipeline.report.results import (
    UNKNOWN_RULE,
    ReportError,
    Run,
    flat,
    folders_in,
    is_run,
    read_run,
    read_runs,
    refuse_damage,
)
from pipeline.track.events import Evaluation
from pipeline.track.journal import last
from pipeline.track.run_state import done_entries, is_driven, suite_entries

Differing = tuple[str, Any, Any]  # a field, and its values in two runs


def select_runs(
    runs_dir: Path, names: Sequence[str | os.PathLike[str]], runs: Sequence[Run]
) -> list[Run]:
    """The runs that names, paths and study keys select, in the order of the names.

    Without names, the runs of the study whose run finished last. Trials of a search belong to no
    study: their accuracy is that of a part of the training set.

    Args:
        runs: all runs of the folder.

    Raises:
        ReportError: a name matches nothing or several runs; or there are no names, and no run has
            finished.
    """
    if names:
        return _named(runs_dir, [os.fspath(name) for name in names], runs)
    for run in runs:
        refuse_damage(run)
    finished = [run for run in runs if run.is_finished]
    trained = [run for run in finished if run.protocol != "trial"]
    if not trained:
        raise ReportError(
            f"compare: {runs_dir} must have a finished run that is no trial of a search; it has"
            f" {counted(len(runs), 'run')}, of which {counted(len(finished), 'trial')} finished"
        )
    newest = max(trained, key=lambda run: run.ended)
    return [run for run in runs if run.study == newest.study]


def _named(runs_dir: Path, names: Sequence[str], runs: Sequence[Run]) -> list[Run]:
    known = {run.folder.resolve(): run for run in runs}
    folders = folders_in(runs_dir, suites=True)
    selected: dict[Path, Run] = {}
    for text in names:
        members = [run for run in runs if text and run.study.startswith(text)]
        keys = sorted({run.study for run in members})
        if not keys or (runs_dir / text).exists():
            folder = find_run(runs_dir, text, among=folders).resolve()
            members = [known.get(folder) or read_run(folder)]
        elif len(keys) > 1:
            raise ReportError(f"compare: {text!r} begins several study keys: {', '.join(keys)}")
        selected |= {run.folder.resolve(): run for run in members}
    return list(selected.values())


def is_study(runs: Sequence[Run], text: str) -> bool:
    """Whether the study key of a run begins with the text."""
    return bool(text) and any(run.study.startswith(text) for run in runs)


def refuse_unlike(runs: Sequence[Run]) -> None:
    """Refuse runs that differ in more than the rule and the seed.

    Raises:
        ReportError: two runs do, or two runs of one rule differ in a tuned value.
    """
    namesakes: dict[str, Run] = {}
    for run in runs[1:]:
        for other in (runs[0], namesakes.setdefault(run.rule, run)):
            if differing_fields := differences(other, run):
                raise ReportError(
                    f"compare: {other.name} and {run.name} differ in more than the rule and the"
                    f" seed: {listed(differing_fields)}; name runs that agree"
                )


def with_baseline(
    runs: Sequence[Run], finished: list[Run], against: str
) -> tuple[list[Run], list[str]]:
    """Add comparable runs of each missing kind of the baseline from the same study.

    BPTT in slices of time is such a kind, because it may be the faster one. If no baseline can be
    added, a note says why.

    Args:
        runs: all runs of the folder.

    Raises:
        ReportError: the added runs would differ from one another.
    """
    reference, there = finished[0], {run.rule for run in finished}
    kinds = [
        run
        for run in runs
        if run.study == reference.study
        and run.is_finished
        and run.rule not in there
        and is_baseline(run.rule, against)
    ]
    fit = [run for run in kinds if not differences(run, reference)]
    if against in there or any(run.rule == against for run in fit):
        fit.sort(key=lambda run: run.rule != against)
        try:
            refuse_unlike(fit)
        except ReportError as error:
            if against not in there:
                raise
            why = str(error).removeprefix("compare: ")
            return finished, [f"times may be divided by a slower {against}: {why}"]
        return sorted(fit + finished, key=lambda run: run.rule != against), []
    base = next((run for run in kinds if run.rule == against), None)
    why = f"study {reference.study[:8]} has no finished run of {against}"
    if base is not None:
        why = f"{base.name} does not stand comparison: {listed(differences(base, reference))}"
    return finished, [f"no baseline, no ratios: {why}"]


def differences(a: Run, b: Run) -> list[Differing]:
    """Every difference between two finished runs that forbids a comparison.

    Unequal study keys are explained by differences of the recipes. Data sets are equal if their
    contents are, so a path is named only if nothing else explains the keys.
    """
    fields = trained_apart(a.trained_on, b.trained_on)
    if a.rule == b.rule:
        # One label in the table must be one rule with one tuned value.
        fields += differing("rule", a.recipe.get("rule"), b.recipe.get("rule"))
        for key in tuned_keys(a.recipe):
            fields += differing(key, recipe_value(a.recipe, key), recipe_value(b.recipe, key))
    if a.study == b.study:
        return fields
    of_recipes = differing_recipes(a, b)
    paths = [
        field
        for field in of_recipes
        if all(value is None or str(value).startswith("/") for value in field[1:])
    ]
    contents = [(run.summary or {}).get("data_fingerprint") for run in (a, b)]
    explained = [
        *(field for field in of_recipes if field not in paths),
        *differing("data_fingerprint", *contents),
    ]
    return (explained or paths or [("study", a.study, b.study)]) + fields


def differing_recipes(a: Run, b: Run) -> list[Differing]:
    """The differences of two recipes in fields that all runs of one study share."""
    shared = (
        {**select(run.recipe, lambda role: Role.STUDY in role), "init": run.recipe.get("init")}
        for run in (a, b)
    )
    return list(differing("", *shared))


def trained_apart(
    mine: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> list[Differing]:
    """The training conditions in which two runs differ.

    A condition that changed during a run has a list of values: `[2, 1]`.
    """
    if list(mine) == list(theirs):
        return []
    return list(differing("", _columns(mine), _columns(theirs))) or [("trained_on", mine, theirs)]


def tuned_keys(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """The dotted keys that each rule has its own value for; may be empty."""
    return tuple(recipe.get("tuned") or ())


def recipe_value(recipe: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key of a JSON recipe, such as `optimizer.lr`."""
    value: Any = recipe
    for name in key.split("."):
        value = value.get("kwargs", value).get(name) if isinstance(value, Mapping) else None
    return value


def _columns(trained_on: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each condition by dotted name. Several values form a list."""
    columns: dict[str, list[Any]] = {}
    for each in trained_on:
        for name, value in flat(each).items():
            if value not in columns.setdefault(name, []):
                columns[name].append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in columns.items()}


def find_run(
    runs_dir: str | os.PathLike[str],
    name_or_path: str | os.PathLike[str],
    *,
    suites: bool = False,
    among: Sequence[Path] | None = None,
) -> Path:
    """The absolute folder of a run, from its name, an unambiguous beginning of it, or a path.

    The folder's parent is the run's own folder of runs, whatever `runs_dir` is.

    Args:
        suites: the name may also be that of a suite.
        among: the value of `folders_in(runs_dir, suites=suites)`, to look up many names faster.

    Raises:
        ReportError: no run has this name, or several begin with it.
    """
    text = os.fspath(name_or_path)
    for folder in (Path(runs_dir) / text, Path(text)):
        if is_run(folder) or (suites and is_suite(folder)):
            # Remove `.` and `..` but keep links: a linked run belongs to the folder of the link.
            return Path(os.path.abspath(folder))  # noqa: PTH100
    folders = folders_in(runs_dir, suites=suites) if among is None else among
    matches = [folder for folder in folders if folder.name.startswith(text)] if text else []
    if len(matches) == 1:
        return matches[0].absolute()
    if matches:
        names = ", ".join(folder.name for folder in matches)
        raise ReportError(f"{text!r} begins the names of {len(matches)} runs: {names}")
    known = first_few([folder.name for folder in folders], 8) or "none"
    raise ReportError(f"no run {text!r} in {runs_dir}; there are {known}")


def locate(runs_dir: Path, names: Sequence[str]) -> tuple[Path, Path | None]:
    """The folder that contains what these names select, and the suite that they name, if any.

    The folder is `runs_dir` if a name is a study key.

    Raises:
        ReportError: a suite is named beside something else.
    """
    there = folders_in(runs_dir, suites=True)
    folders: list[Path] = []
    for name in names:
        try:
            folders.append(find_run(runs_dir, name, suites=True, among=there))
        except ReportError:
            continue  # a study, or nothing: `select_runs` raises the precise error
    suite = next(filter(is_suite, folders), None)
    if suite is not None and len(names) > 1:
        raise ReportError(
            f"compare: a suite is compared by itself; got {suite.name} among {', '.join(names)}"
        )
    parents = {folder.parent for folder in folders}
    is_elsewhere = len(folders) == len(names) and len(parents) == 1
    return parents.pop() if is_elsewhere else runs_dir, suite


# --------------------------------------------------------------------------------- spiketrain runs


class SuiteRow(NamedTuple):
    """A suite in a list."""

    name: str
    state: str  # for example "2 of 5 finished"
    resume: str | None  # the command; None for a suite that is finished or running


def list_runs(runs_dir: str | os.PathLike[str]) -> list[Run]:
    """Return all runs of a folder, the newest start first."""
    return sorted(read_runs(Path(runs_dir)), key=lambda run: run.started, reverse=True)


def list_suites(runs_dir: str | os.PathLike[str]) -> list[SuiteRow]:
    """Return all suites of a folder, the newest launch first."""
    folders = [each for each in folders_in(runs_dir, suites=True) if is_suite(each)]
    folders.sort(key=lambda folder: (folder / FILE).stat().st_mtime, reverse=True)
    return [_suite_row(folder) for folder in folders]


def print_runs(runs_dir: str | os.PathLike[str], console: Console | None = None) -> None:
    """Print suites and runs as tables, and each resume command on a line of its own."""
    console = console or new_console()
    runs, suites = list_runs(runs_dir), list_suites(runs_dir)
    if not runs and not suites:
        say(console, f"no runs in {os.fspath(runs_dir)}")
        return
    if suites:
        print_table(console, ("suite", "state"), [(suite.name, suite.state) for suite in suites])
        console.print()
    columns = ("run", "state", "rule", "study", number("step"), number("top-1"))
    print_table(console, columns, map(_cells, runs))
    commands = [suite.resume for suite in suites if suite.resume]
    over = ("finished", "running", "diverged")
    commands += [how_to_resume(run.folder) for run in runs if run.state not in over]
    for command in commands:
        say(console, command, whole=[command])


def _cells(run: Run) -> tuple[str, ...]:
    """The cells of a run in the list. top-1 is the result of a finished run, and of another run
    that of its newest evaluation.
    """
    top1 = run.value("top1")
    if run.state != "finished":
        evaluation = last(RunFolder(run.folder).journal, Evaluation.kind) or {}
        top1 = (evaluation.get("metrics") or {}).get("top1")
    return (
        run.name,
        run.state,
        "-" if run.rule == UNKNOWN_RULE else run.rule,
        run.study[:8] or "-",
        "-" if run.step is None else f"{run.step}/{run.total_steps or '?'}",
        "-" if top1 is None else f"{top1:.2%}",
    )


def _suite_row(folder: Path) -> SuiteRow:
    try:
        runs, over = suite_entries(folder), len(done_entries(folder))
    except ValueError:  # the list still shows every other suite
        return SuiteRow(folder.name, f"{FILE} is damaged", None)
    state = f"{over} of {len(runs)} finished"
    if is_driven(folder):
        return SuiteRow(folder.name, f"{state}, running", None)
    return SuiteRow(folder.name, state, None if over == len(runs) else how_to_resume(folder))
