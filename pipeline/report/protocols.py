"""The two protocols of a comparison beside one another: the same settings for every rule, and each
rule with its own best.

The trials, which chose, are listed with what they did on the part of the training set that they had
held out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.core.printing import number, print_table, say
from pipeline.recipe.json import flat
from pipeline.report.choose import study_of, unfinished_run
from pipeline.report.compare import comparisons
from pipeline.report.differences import written
from pipeline.report.runs import recipe_of
from pipeline.track.journal import last
from pipeline.track.state import state_of
from pipeline.track.trials import best, top1_of

TITLES = {
    "shared": "shared: only the rule differs",
    "tuned": "tuned: each rule with its own best value of {fields}",
}


def print_protocols(runs: Mapping[str, Path], console: Console) -> dict[str, Any]:
    """A table for each study of a protocol, and one of the trials; what it prints as JSON. Called
    with all runs of a suite.

    A study of which every run diverged has no table: its runs are named.
    """
    told: dict[str, Any] = {}
    by_protocol = _by_protocol(runs)
    for protocol, title in TITLES.items():
        told[protocol] = []
        for study, folders in by_protocol.get(protocol, {}).items():
            fields = ", ".join(recipe_of(folders[0]).get("tuned", ()))
            say(console, title.format(fields=fields), style="bold")
            if all(state_of(folder) == "diverged" for folder in folders):
                lost = [unfinished_run(folder) for folder in folders]
                for run in lost:
                    say(console, f"{run.folder.name} ({run.rule}) diverged")
                console.print()
                told[protocol].append(
                    {"study": study, "runs": [], "unfinished": [run.to_json() for run in lost]}
                )
                continue
            for comparison in comparisons(folders[0].parent, folders):
                comparison.render(console)
                console.print()
                told[protocol].append(comparison.to_json())
    trials = [
        trial for folders in by_protocol.get("trial", {}).values() for trial in _trials(folders)
    ]
    _print_trials(trials, console)
    return {**told, "trials": trials}


def _by_protocol(runs: Mapping[str, Path]) -> dict[str, dict[str, list[Path]]]:
    """Folders by protocol and study."""
    found: dict[str, dict[str, list[Path]]] = {}
    for folder in runs.values():
        protocol = recipe_of(folder).get("protocol", "shared")
        found.setdefault(protocol, {}).setdefault(study_of(folder), []).append(folder)
    return found


def _trials(folders: list[Path]) -> Iterator[dict[str, Any]]:
    """Of one study, each search's in the order that they were tried in, and which was taken."""
    searches: dict[str, dict[str, float | None]] = {}
    for folder in folders:
        searches.setdefault(_search(folder), {})[folder.name] = top1_of(folder)
    for folder in folders:
        recipe, tried = recipe_of(folder), searches[_search(folder)]
        [field] = recipe["tuned"]
        yield {
            "run": folder.name,
            "rule": str((last(folder / "journal.jsonl", "start") or {}).get("rule", "-")),
            "field": field,
            "value": written(recipe, field),
            "top1": tried[folder.name],
            "taken": folder.name == best(tried),
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


def _search(folder: Path) -> str:
    """Trials of one search differ in their name and in the value that they try alone: what differs
    in anything else, such as one keyword of its rule or its family, has a search of its own
    (`pipeline.recipe.search.tuned`)."""
    recipe = recipe_of(folder)
    tried = ("name", *recipe["tuned"])
    return json.dumps(
        {key: value for key, value in flat(recipe) if key not in tried}, sort_keys=True
    )
