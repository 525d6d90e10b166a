"""Select runs by name or study key, or the newest study, and find the runs they compare with."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.units import counted
from pipeline.recipe import is_baseline
from pipeline.recipe.json import differing, listed
from pipeline.recipe.recipe import Role, select
from pipeline.recipe.suite import is_suite
from pipeline.report.results import (
    ReportError,
    Run,
    flat,
    folders_in,
    is_run,
    read_run,
    refuse_damage,
)

Differing = tuple[str, Any, Any]  # a field, and its values in two runs


class ComparisonError(ReportError):
    """Runs must not be compared, or none exists; the message is one line with the difference."""


def chosen(
    runs_dir: Path, names: Sequence[str | os.PathLike[str]], runs: Sequence[Run]
) -> list[Run]:
    """The runs that names, paths and study keys select, in the order of the names.

    Without names, the runs of the study whose run finished last. Trials of a search belong to no
    study: their accuracy is that of a part of the training set.

    Args:
        runs: all runs of the folder.

    Raises:
        ReportError: a name matches nothing, or several runs.
        ComparisonError: there are no names, and no run has finished.
    """
    if names:
        return _named(runs_dir, [os.fspath(name) for name in names], runs)
    for run in runs:
        refuse_damage(run)
    finished = [run for run in runs if run.is_finished]
    newest = max(
        (run for run in finished if run.protocol != "trial"),
        key=lambda run: run.ended,
        default=None,
    )
    if newest is not None:
        return [run for run in runs if run.study == newest.study]
    nothing = f"compare: no finished run in {runs_dir}"
    if finished:
        raise ComparisonError(
            f"{nothing} but {counted(len(finished), 'trial')} on a held-out part, no runs to set"
            " beside one another"
        )
    there = f"it has {len(runs)} that did not finish" if runs else "it has no runs"
    raise ComparisonError(f"{nothing}; {there}")


def _named(runs_dir: Path, names: Sequence[str], runs: Sequence[Run]) -> list[Run]:
    known = {run.folder.resolve(): run for run in runs}
    selected: dict[Path, Run] = {}
    for text in names:
        members = [run for run in runs if text and run.study.startswith(text)]
        keys = sorted({run.study for run in members})
        if not keys or (runs_dir / text).exists():
            folder = find_run(runs_dir, text, among=[run.folder for run in runs]).resolve()
            members = [known.get(folder) or read_run(folder)]
        elif len(keys) > 1:
            raise ComparisonError(f"compare: {text!r} begins several study keys: {', '.join(keys)}")
        selected |= {run.folder.resolve(): run for run in members}
    return list(selected.values())


def is_study(runs: Sequence[Run], text: str) -> bool:
    """Whether the study key of a run begins with the text."""
    return bool(text) and any(run.study.startswith(text) for run in runs)


def refuse_unlike(runs: Sequence[Run]) -> None:
    """Refuse runs that differ in more than the rule and the seed.

    Raises:
        ComparisonError: two runs do, or two runs of one rule differ in a tuned value.
    """
    namesakes: dict[str, Run] = {}
    for run in runs[1:]:
        for other in (runs[0], namesakes.setdefault(run.rule, run)):
            if differing_fields := differences(other, run):
                what = f"differ in more than the rule and the seed: {listed(differing_fields)}"
                raise ComparisonError(
                    f"compare: {other.name} and {run.name} {what}; name runs that agree"
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
        ComparisonError: the added runs would differ from one another.
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
        except ComparisonError as error:
            if against not in there:
                raise
            why = str(error).removeprefix("compare: ")
            return finished, [f"times may be divided by a slower {against}: {why}"]
        return sorted(fit + finished, key=lambda run: run.rule != against), []
    base = next((run for run in kinds if run.rule == against), None)
    if base is None:
        why = f"study {reference.study[:8]} has no finished run of {against}"
    else:
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
        for key in tuned_in(a.recipe):
            fields += differing(key, written(a.recipe, key), written(b.recipe, key))
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


def tuned_in(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """The dotted keys that each rule has its own value for; may be empty."""
    keys = recipe.get("tuned")
    return tuple(keys) if isinstance(keys, (list, tuple)) else ()


def written(recipe: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key such as `optimizer.lr`, in a JSON recipe or flat parameters."""
    if key in recipe:
        return recipe[key]
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


class AmbiguousName(ReportError):
    """The given text is the beginning of several run names."""


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
        raise AmbiguousName(f"{text!r} begins the names of {len(matches)} runs: {names}")
    known = ", ".join(folder.name for folder in folders[:8]) + (", ..." if len(folders) > 8 else "")
    there = f"; there are {known}" if folders else ", which has no runs"
    what = "run or suite" if suites else "run"
    raise ReportError(f"no {what} {text!r} in {runs_dir}{there}")


def runs_dir_of(runs_dir: Path, names: Sequence[str]) -> Path:
    """The folder that contains all these runs and suites; `runs_dir` if a name is a study key."""
    there = folders_in(runs_dir, suites=True)
    try:
        folders = {find_run(runs_dir, name, suites=True, among=there).parent for name in names}
    except ReportError:
        return runs_dir
    return folders.pop() if len(folders) == 1 else runs_dir
