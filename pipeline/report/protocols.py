"""A search's report: shared settings for every rule, beside each rule with its own best value.

The trials are listed with their accuracy on the held-out part of the training set.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.core.printing import number, print_table, say
from pipeline.recipe.json import flat
from pipeline.report.compare import comparisons, unfinished_to_json
from pipeline.report.results import Run, read_run
from pipeline.report.selection import written
from pipeline.track.state import best

TITLES = {
    "shared": "shared: only the rule differs",
    "tuned": "tuned: each rule with its own best value of {fields}",
}


def print_protocols(runs: Mapping[str, Path], console: Console) -> dict[str, Any]:
    """Print a table for each study of a protocol, and one of the trials.

    A study whose runs all diverged has no table: its runs are named.

    Args:
        runs: all runs of a suite.

    Returns:
        what it printed, as JSON values.
    """
    found: dict[str, Any] = {}
    read = [read_run(folder) for folder in runs.values()]
    for protocol, title in TITLES.items():
        found[protocol] = []
        of_protocol = [run for run in read if run.protocol == protocol]
        for study in dict.fromkeys(run.study for run in of_protocol):
            members = [run for run in of_protocol if run.study == study]
            say(
                console,
                title.format(fields=", ".join(members[0].recipe.get("tuned", ()))),
                style="bold",
            )
            if all(run.state == "diverged" for run in members):
                for run in members:
                    say(console, f"{run.name} ({run.rule}) diverged")
                console.print()
                lost = list(map(unfinished_to_json, members))
                found[protocol].append({"study": study, "runs": [], "unfinished": lost})
                continue
            folders = [run.folder for run in members]
            for comparison in comparisons(folders[0].parent, folders):
                comparison.render(console)
                console.print()
                found[protocol].append(comparison.to_json())
    tried = [run for run in read if run.protocol == "trial"]
    studies = dict.fromkeys(run.study for run in tried)
    trials = list(_trials([run for study in studies for run in tried if run.study == study]))
    _print_trials(trials, console)
    return {**found, "trials": trials}


def _trials(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """The trials of each search in the order that they were tried in, and which was taken."""
    searches: dict[tuple[str, str], dict[str, float | None]] = {}
    for run in runs:
        top1 = None if run.state == "diverged" else run.value("top1")
        searches.setdefault((run.study, _search(run)), {})[run.name] = top1
    for run in runs:
        tried = searches[run.study, _search(run)]
        [field] = run.recipe["tuned"]
        yield {
            "run": run.name,
            "rule": run.rule,
            "field": field,
            "value": written(run.recipe, field),
            "top1": tried[run.name],
            "taken": run.name == best(tried),
        }


def _print_trials(trials: list[dict[str, Any]], console: Console) -> None:
    rows = []
    for trial in trials:
        top1 = "diverged" if trial["top1"] is None else f"{trial['top1']:.2%}"
        rows.append(
            (
                trial["rule"],
                trial["field"],
                str(trial["value"]),
                top1,
                "taken" if trial["taken"] else "",
            )
        )
    print_table(
        console,
        ("rule", "field", number("value"), number("top-1"), ""),
        rows,
        title="trials, on a held-out part",
    )


def _search(run: Run) -> str:
    """What the trials of one search share: all but their name and the value that they try."""
    tried = ("name", *run.recipe["tuned"])
    fields = {key: value for key, value in flat(run.recipe) if key not in tried}
    return json.dumps(fields, sort_keys=True)
