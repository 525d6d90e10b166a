"""Select the runs of a folder by name or study key, add their baselines, and list all runs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from pipeline.core.printing import new_console, number, print_table, say, say_next
from pipeline.core.run_folder import RunFolder
from pipeline.core.units import counted, first_few
from pipeline.recipe import is_baseline
from pipeline.recipe.json import differing, listed
from pipeline.recipe.recipe import Role, select
from pipeline.recipe.suite import FILE, how_to_resume, is_suite
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

    Without names, these are the runs of the study with the newest finished run. Trials of a search
    do not count as finished: their accuracy is that of a part of the training set.

    Args:
        runs: all runs of the folder.

    Raises:
        ReportError: a name matches nothing, several runs or several study keys; or there are no
            names, and a run is damaged or no run has finished.
    """
    if names:
        return _select_named(runs_dir, [os.fspath(name) for name in names], runs)
    for run in runs:
        refuse_damage(run)
    finished = [run for run in runs if run.is_finished]
    trained = [run for run in finished if run.protocol != "trial"]
    if not trained:
        raise ReportError(
            f"compare: {runs_dir} must have a finished run that is no trial of a search; got"
            f" {counted(len(runs), 'run')}, of which {counted(len(finished), 'trial')} finished"
        )
    newest = max(trained, key=lambda run: run.ended)
    return [run for run in runs if run.study == newest.study]


def _select_named(runs_dir: Path, names: Sequence[str], runs: Sequence[Run]) -> list[Run]:
    known = {run.folder.resolve(): run for run in runs}
    folders = folders_in(runs_dir, suites=True)
    selected: dict[Path, Run] = {}
    for text in names:
        members = [run for run in runs if text and run.study.startswith(text)]
        keys = sorted({run.study for run in members})
        if not keys or (runs_dir / text).exists():
            folder = find_run(runs_dir, text, folders=folders).resolve()
            members = [known.get(folder) or read_run(folder)]
        elif len(keys) > 1:
            raise ReportError(f"compare: {text!r} begins several study keys: {', '.join(keys)}")
        selected |= {run.folder.resolve(): run for run in members}
    return list(selected.values())


def refuse_unlike(runs: Sequence[Run]) -> None:
    """Refuse runs that differ in more than the rule and the seed.

    Raises:
        ReportError: two runs differ in more, or two runs of one label differ in the rule's
            keywords or in a tuned value.
    """
    first_of: dict[str, Run] = {}
    for run in runs[1:]:
        for other in (runs[0], first_of.setdefault(run.rule, run)):
            if found := differences(other, run):
                raise ReportError(
                    f"compare: {other.name} and {run.name} differ in more than the rule and the"
                    f" seed: {listed(found)}; name runs that agree"
                )


def with_baseline(
    runs: Sequence[Run], finished: list[Run], against: str
) -> tuple[list[Run], list[str]]:
    """Add the study's comparable runs of each form of the baseline that `finished` lacks.

    BPTT in slices of time is a form of BPTT, and may be faster than BPTT folded over time.

    Args:
        runs: all runs of the folder.

    Returns:
        The runs, and a note if ratios lack a baseline or may use a slower one.

    Raises:
        ReportError: the added runs differ from one another, and `finished` has no baseline.
    """
    reference, rules = finished[0], {run.rule for run in finished}
    candidates = [
        run
        for run in runs
        if run.study == reference.study
        and run.is_finished
        and run.rule not in rules
        and is_baseline(run.rule, against)
    ]
    added = [run for run in candidates if not differences(run, reference)]
    if against in rules or any(run.rule == against for run in added):
        added.sort(key=lambda run: run.rule != against)
        try:
            refuse_unlike(added)
        except ReportError as error:
            if against not in rules:
                raise
            reason = str(error).removeprefix("compare: ")
            return finished, [f"times may be divided by a slower {against}: {reason}"]
        return sorted(added + finished, key=lambda run: run.rule != against), []
    base = next((run for run in candidates if run.rule == against), None)
    reason = f"study {reference.study[:8]} has no finished run of {against}"
    if base is not None:
        reason = f"{base.name} is not comparable: {listed(differences(base, reference))}"
    return finished, [f"no baseline, no ratios: {reason}"]


def differences(a: Run, b: Run) -> list[Differing]:
    """Every difference between two finished runs that forbids a comparison.

    If the study keys differ, the recipes show why. The contents of a file count, not its path, so a
    path is named only if nothing else differs.
    """
    fields = differing_conditions(a.trained_on, b.trained_on)
    if a.rule == b.rule:
        # One label in the table must be one rule with one tuned value.
        fields += differing("rule", a.recipe.get("rule"), b.recipe.get("rule"))
        for key in tuned_keys(a.recipe):
            fields += differing(key, recipe_value(a.recipe, key), recipe_value(b.recipe, key))
    if a.study == b.study:
        return fields
    recipe_fields = differing_fields(a, b)
    path_fields = [
        field
        for field in recipe_fields
        if all(value is None or str(value).startswith("/") for value in field[1:])
    ]
    fingerprints = [(run.summary or {}).get("data_fingerprint") for run in (a, b)]
    causes = [
        *(field for field in recipe_fields if field not in path_fields),
        *differing("data_fingerprint", *fingerprints),
    ]
    return (causes or path_fields or [("study", a.study, b.study)]) + fields


def differing_fields(a: Run, b: Run) -> list[Differing]:
    """The differences of two recipes in fields that all runs of one study share."""
    shared = (
        {**select(run.recipe, lambda role: Role.STUDY in role), "init": run.recipe.get("init")}
        for run in (a, b)
    )
    return list(differing("", *shared))


def differing_conditions(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]
) -> list[Differing]:
    """The training conditions in which two runs differ.

    A condition that changed during a run has a list of values: `[2, 1]`.
    """
    if list(a) == list(b):
        return []
    return list(differing("", _columns(a), _columns(b))) or [("trained_on", a, b)]


def tuned_keys(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """The dotted keys with a tuned value for each rule; may be empty."""
    return tuple(recipe.get("tuned") or ())


def recipe_value(recipe: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key of a JSON recipe, such as `optimizer.lr`."""
    value: Any = recipe
    for name in key.split("."):
        value = value.get("kwargs", value).get(name) if isinstance(value, Mapping) else None
    return value


def _columns(trained_on: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The values of each condition by dotted name: a list if there are several."""
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
    folders: Sequence[Path] | None = None,
) -> Path:
    """The absolute folder of a run, from its name, an unambiguous prefix of the name, or a path.

    A name in `runs_dir` comes first. A path may lead to a run outside of `runs_dir`.

    Args:
        suites: the name may also be that of a suite.
        folders: the value of `folders_in(runs_dir, suites=suites)`, to find many names faster.

    Raises:
        ReportError: no run has this name, or several names begin with it.
    """
    text = os.fspath(name_or_path)
    for folder in (Path(runs_dir) / text, Path(text)):
        if is_run(folder) or (suites and is_suite(folder)):
            # Remove `.` and `..` but keep links: a linked run belongs to the folder of the link.
            return Path(os.path.abspath(folder))  # noqa: PTH100
    folders = folders_in(runs_dir, suites=suites) if folders is None else folders
    matches = [folder for folder in folders if folder.name.startswith(text)] if text else []
    if len(matches) == 1:
        return matches[0].absolute()
    if matches:
        names = ", ".join(folder.name for folder in matches)
        raise ReportError(f"{text!r} begins the names of {len(matches)} runs: {names}")
    known = first_few([folder.name for folder in folders], 8) or "none"
    raise ReportError(f"no run {text!r} in {runs_dir}; there are {known}")


def locate(runs_dir: Path, names: Sequence[str]) -> tuple[Path, Path | None]:
    """The folder of the runs that these names select, and the named suite, if there is one.

    The folder is the parent of the named runs if all names are runs with one parent; otherwise
    `runs_dir`.

    Raises:
        ReportError: a suite is not the only name.
    """
    known = folders_in(runs_dir, suites=True)
    folders: list[Path] = []
    for name in names:
        try:
            folders.append(find_run(runs_dir, name, suites=True, folders=known))
        except ReportError:
            continue  # a study key or an unknown name: `select_runs` raises the precise error
    suite = next(filter(is_suite, folders), None)
    if suite is not None and len(names) > 1:
        raise ReportError(
            f"compare: a suite must be the only name; got {suite.name} in {', '.join(names)}"
        )
    parents = {folder.parent for folder in folders}
    if len(folders) == len(names) and len(parents) == 1:
        return parents.pop(), suite
    return runs_dir, suite


# --------------------------------------------------------------------------------- spiketrain runs


class SuiteRow(NamedTuple):
    name: str
    state: str  # for example "2 of 5 finished"
    resume: str | None  # the command; None for a finished, running or damaged suite


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
        say_next(console, ["spiketrain new mine"])
        return
    if suites:
        print_table(console, ("suite", "state"), [(suite.name, suite.state) for suite in suites])
        console.print()
    columns = ("run", "state", "rule", "study", number("step"), number("top-1"))
    print_table(console, columns, map(_cells, runs))
    commands = [suite.resume for suite in suites if suite.resume]
    not_resumable = ("finished", "running", "diverged")
    commands += [how_to_resume(run.folder) for run in runs if run.state not in not_resumable]
    for command in commands:
        say(console, command, whole=[command])


def _cells(run: Run) -> tuple[str, ...]:
    """The cells of a run. For an unfinished run, top-1 is from the newest evaluation."""
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
        entries, done = len(suite_entries(folder)), len(done_entries(folder))
    except ValueError:  # the list still shows every other suite
        return SuiteRow(folder.name, f"{FILE} is damaged", None)
    state = f"{done} of {entries} finished"
    if is_driven(folder):
        return SuiteRow(folder.name, f"{state}, running", None)
    return SuiteRow(folder.name, state, None if done == entries else how_to_resume(folder))
