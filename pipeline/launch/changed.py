"""Options that hold from a resume on: written into the folder, so that whoever goes on with it next need not say them again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.launch.cluster import Cluster, differences
from pipeline.launch.lock import driver_lock
from pipeline.launch.prepare import read_job, write_job
from pipeline.printing import say
from pipeline.recipe import read_json, write_json
from pipeline.suite import SuiteFile


def change_run(folder: Path, options: Mapping[str, Any], console: Console) -> None:
    """Write fields of OPERATIONAL into a run's cluster.json and job.json, and say what differs.

    Raises:
        Refused: somebody else trains it.
        ValueError: a file is damaged.
    """
    if not options:
        return
    with driver_lock(folder):
        was = _write(folder, options)
    _say(folder, was, replace(was, **options), console)


def change_suite(
    folder: Path, suite_file: SuiteFile, options: Mapping[str, Any], begun: Iterable[Path], console: Console
) -> SuiteFile:
    """Likewise into suite.json and the folders of the runs that have `begun`; those to come are made as suite.json says."""
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
    """How it was. The job first: killed between the two, the same words find the cluster as it was and write both again."""
    was = Cluster.from_json(read_json(run / "cluster.json"))
    now = replace(was, **options)
    write_job(replace(read_job(run), **now.of_workers))
    write_json(run / "cluster.json", asdict(now))
    return was


def _say(folder: Path, was: Cluster, now: Cluster, console: Console) -> None:
    if told := ", ".join(differences(was, now).values()):
        say(console, f"{folder.name}: {told} from here on")
