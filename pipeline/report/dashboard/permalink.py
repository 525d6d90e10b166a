"""The mapping between a URL and a view. The URL is a permalink: every reader sees the same view.

A URL without runs shows up to MAX_RUNS runs of the study, the newest seeds first.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args
from urllib.parse import parse_qs, urlencode

from pipeline.recipe import is_baseline
from pipeline.report.page import VIEWS
from pipeline.report.stores import StoredRun, StoredStudy

# The state filter of the list. A silent run is neither running nor known to have ended.
Only = Literal["all", "running", "finished", "failed"]
ONLY: dict[Only, tuple[str, frozenset[str]]] = {
    "all": ("all", frozenset()),
    "running": ("running", frozenset({"running"})),
    "finished": ("finished", frozenset({"finished"})),
    "failed": ("diverged, failed or stopped", frozenset({"diverged", "failed", "stopped"})),
}
MAX_RUNS = 24  # the most runs of a study that are shown if the URL names none


@dataclass(frozen=True, kw_only=True)
class ViewState:
    study: str = ""  # the study key
    family: str = ""  # the experiment; several experiments may have the same study key
    runs: tuple[str, ...] | None = None  # short ids of the picked runs; None: see `picked`
    view: str = "costs"  # a key of `VIEWS`
    text: str = ""  # the text filter: a listed study has each word in some column
    only: Only = "all"
    beside: str = ""  # the study key of a second study
    beside_family: str = ""
    beside_runs: tuple[str, ...] | None = None

    @classmethod
    def at(cls, search: str) -> Self:
        """Parse the query of a URL. Wrong values become defaults."""
        try:
            fields = parse_qs(search.lstrip("?"), max_num_fields=20)
        except ValueError:  # the query has more fields than any of our URLs
            return cls()
        query = {name: values[-1] for name, values in fields.items()}
        return cls(
            study=query.get("study", "")[:64],
            family=query.get("family", "")[:250],
            runs=_ids(query.get("runs")),
            view=_value_or_default(query.get("view"), tuple(VIEWS), "costs"),
            text=query.get("text", "")[:200],
            only=_value_or_default(query.get("only"), get_args(Only), "all"),
            beside=query.get("beside", "")[:64],
            beside_family=query.get("beside_family", "")[:250],
            beside_runs=_ids(query.get("beside_runs")),
        )

    @property
    def search(self) -> str:
        """Return the query, without defaults."""
        fields: dict[str, Any] = {
            each.name: getattr(self, each.name)
            for each in dataclasses.fields(self)
            if getattr(self, each.name) != each.default
        }
        for name in fields.keys() & {"runs", "beside_runs"}:
            fields[name] = ".".join(fields[name]) or "none"
        return f"?{urlencode(fields)}" if fields else ""

    @property
    def second(self) -> Self:
        """The view of the study beside the open one. The open study stands beside it."""
        return replace(
            self,
            study=self.beside,
            family=self.beside_family,
            runs=self.beside_runs,
            beside=self.study,
            beside_family=self.family,
            beside_runs=self.runs,
        )

    def at_study(self, study: StoredStudy) -> Self:
        if (self.study, self.family) == (study.study, study.experiment):
            return self
        return replace(self, study=study.study, family=study.experiment, runs=None)

    def listed(self, studies: Sequence[StoredStudy]) -> list[StoredStudy]:
        states, words = ONLY[self.only][1], self.text.lower().split()
        listed: list[StoredStudy] = []
        for study in studies:
            names = [study.title, study.study, study.experiment, *study.rules, study.protocol]
            text = " ".join([*names, *study.seeds, describe_states(study.states)]).lower()
            if (not states or states & study.states.keys()) and all(each in text for each in words):
                listed.append(study)
        return listed

    def picked(self, runs: Sequence[StoredRun]) -> list[StoredRun]:
        """The runs of the study that are shown. `runs`: all runs of the study, newest first.

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
        return [run for run in runs if self.family in ("", run.experiment)]


def _value_or_default(value: str | None, known: tuple[Any, ...], default: str) -> Any:
    return value if value in known else default


def _ids(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return tuple(each for each in text.split(".") if each not in ("", "none"))


def describe_states(states: Mapping[str, int]) -> str:
    """A text such as `3 finished, 1 running, 1 silent`."""
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
