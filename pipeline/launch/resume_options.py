"""What may change when a run or suite goes on, and what is refused.

`launch --or-resume` goes on with what was launched in the same way. `resume` takes other options of
operation, which are written into the folder and hold from then on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.core.printing import say
from pipeline.core.run_folder import RunFolder
from pipeline.launch.cluster import OPERATIONAL, Cluster, differences
from pipeline.launch.lock import driver_lock
from pipeline.launch.prepare import read_job, write_job
from pipeline.recipe.json import differing, listed, recipe_fields
from pipeline.recipe.recipe import Recipe, read_json, write_json
from pipeline.recipe.suite import Suite, SuiteFile, is_suite

MAY_DIFFER = ("workers", "inline", "address", *OPERATIONAL)
"""Fields of `Cluster` in which a launch may differ from the one that it goes on with."""


def refuse_unless_launched_so(
    folder: Path, made: Recipe | Suite, cluster: Cluster, *, trust: tuple[str, ...]
) -> None:
    """Refuse to go on with a run or suite that was launched with another recipe or other options.

    Raises:
        ValueError: what differs, as it was and as it is asked for now; or a damaged folder.
    """
    rule = f"launch: --or-resume goes on with {folder.name} as it was launched"
    if is_suite(folder) != isinstance(made, Suite):
        there, asked = ("a suite", "one recipe") if is_suite(folder) else ("one run", "a suite")
        raise ValueError(f"{rule}; it is {there}, and now {asked} is asked for")
    found = list(_differences(folder, made, trust=trust))
    if found:
        raise ValueError(f"{rule}; its recipe differs now: {listed(found)}")
    there = (
        read_json(RunFolder(folder).cluster)
        if isinstance(made, Recipe)
        else SuiteFile.read(folder, trust=trust).cluster
    )
    was, now = Cluster.from_json(there), cluster
    changed = [told for name, told in differences(was, now).items() if name not in MAY_DIFFER]
    if changed:
        raise ValueError(f"{rule}; its options differ now: {', '.join(changed)}")


def _differences(
    folder: Path, made: Recipe | Suite, *, trust: tuple[str, ...]
) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(made, Recipe):
        yield from differing("", recipe_fields(folder), _as_read(made.resolved()))
        return
    was, now = (
        {each.name: each for each in suite.recipes}
        for suite in (SuiteFile.read(folder, trust=trust).suite, made.resolved())
    )
    if list(was) != list(now):
        yield "recipes", list(was), list(now)
        return
    for name in was:
        yield from differing(name, _as_read(was[name]), _as_read(now[name]))


def _as_read(recipe: Recipe) -> Any:
    """The fields of a recipe as recipe.json holds them."""
    return json.loads(json.dumps(recipe.to_json()))["recipe"]


def change_run(folder: Path, options: Mapping[str, Any], console: Console) -> None:
    """Write fields of OPERATIONAL into a run's cluster.json and job.json, and say what differs.

    Raises:
        UserError: somebody else trains it.
        ValueError: a file is damaged.
    """
    if not options:
        return
    with driver_lock(folder):
        was = _write(folder, options)
    _say(folder, was, replace(was, **options), console)


def change_suite(
    folder: Path,
    suite_file: SuiteFile,
    options: Mapping[str, Any],
    begun: Iterable[Path],
    console: Console,
) -> SuiteFile:
    """Write fields of OPERATIONAL into suite.json and the folders of the runs that have `begun`.

    Later runs are made from suite.json.
    """
    if not options:
        return suite_file
    was = Cluster.from_json(suite_file.cluster)
    now = replace(was, **options)
    changed = replace(suite_file, cluster=asdict(now))
    with driver_lock(folder):
        for run in begun:
            _write(run, options)
        changed.write(folder)
    _say(folder, was, now, console)
    return changed


def _write(run: Path, options: Mapping[str, Any]) -> Cluster:
    """Write the options into a run's files, and return its cluster before.

    job.json is written first: a driver killed between the two files leaves cluster.json as it was,
    and the same command writes both again.
    """
    file = RunFolder(run).cluster
    was = Cluster.from_json(read_json(file))
    now = replace(was, **options)
    write_job(replace(read_job(run), **now.of_workers))
    write_json(file, asdict(now))
    return was


def _say(folder: Path, was: Cluster, now: Cluster, console: Console) -> None:
    if told := ", ".join(differences(was, now).values()):
        say(console, f"{folder.name}: {told} from here on")
