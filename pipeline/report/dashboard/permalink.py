"""The mapping between a URL and a view. The URL is a permalink: every reader sees the same view.

A URL without runs shows up to MAX_RUNS runs of the study, the newest seeds first.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self
from urllib.parse import parse_qs, urlencode

from pipeline.recipe import is_baseline
from pipeline.report.page import VIEWS
from pipeline.report.stores import StoredRun, StoredStudy

MAX_RUNS = 24  # the most runs of a study that are shown if the URL names none


@dataclass(frozen=True, kw_only=True)
class ViewState:
    study: str = ""  # the study key
    family: str = ""  # the experiment; several experiments may have the same study key
    runs: tuple[str, ...] | None = None  # short ids of the picked runs; None: see `picked`
    view: str = "costs"  # a key of `VIEWS`
    text: str = ""  # the text filter: a listed study has each word in some column
    beside: str = ""  # the key of the study at the other side

    @classmethod
    def at(cls, search: str, *, second: bool = False) -> Self:
        """Parse the query of a URL. Wrong values become defaults.

        Args:
            second: return the view of the second study, which the query names as `beside`.
        """
        query = {name: values[-1] for name, values in parse_qs(search.lstrip("?")).items()}
        study, beside, prefix = "study", "beside", ""
        if second:
            study, beside, prefix = "beside", "study", "beside_"
        ids, view = query.get(f"{prefix}runs"), query.get("view", "")
        return cls(
            study=query.get(study, "")[:64],
            family=query.get(f"{prefix}family", "")[:250],
            runs=None if ids is None else tuple(each for each in ids.split(".") if each != "none"),
            view=view if view in VIEWS else "costs",
            text=query.get("text", "")[:200],
            beside=query.get(beside, "")[:64],
        )

    @property
    def search(self) -> str:
        """Return the query, without defaults."""
        fields: dict[str, Any] = {
            each.name: getattr(self, each.name)
            for each in dataclasses.fields(self)
            if getattr(self, each.name) != each.default
        }
        if self.runs is not None:
            fields["runs"] = ".".join(self.runs) or "none"
        return f"?{urlencode(fields)}" if fields else ""

    def at_study(self, study: StoredStudy) -> Self:
        return replace(self, study=study.study, family=study.experiment, runs=None)

    def listed(self, studies: Sequence[StoredStudy]) -> list[StoredStudy]:
        listed: list[StoredStudy] = []
        for study in studies:
            names = [study.title, study.study, study.experiment, *study.rules, study.protocol]
            text = " ".join([*names, *study.seeds, describe_states(study.states)]).lower()
            if all(word in text for word in self.text.lower().split()):
                listed.append(study)
        return listed

    def picked(self, runs: Sequence[StoredRun]) -> list[StoredRun]:
        """The runs of the study that are shown. `runs`: all runs of the store, newest first.

        If the URL names no runs, these are up to MAX_RUNS runs of the newest seeds. Baselines of a
        seed are preferred to its other runs.
        """
        members = self.members(runs)
        if self.runs is not None:
            return [run for run in members if run.short in self.runs]
        seeds = list(dict.fromkeys(run.seed for run in members))
        by_seed = sorted(
            members, key=lambda run: (seeds.index(run.seed), not is_baseline(run.rule))
        )
        shown = {run.id for run in by_seed[:MAX_RUNS]}
        return [run for run in members if run.id in shown]

    def members(self, runs: Sequence[StoredRun]) -> list[StoredRun]:
        return [
            run for run in runs if run.study == self.study and self.family in ("", run.experiment)
        ]


def describe_states(states: Mapping[str, int]) -> str:
    """A text such as `3 finished, 1 running, 1 silent`."""
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
