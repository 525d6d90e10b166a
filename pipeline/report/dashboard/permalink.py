"""The mapping between a URL and a view. The URL is a permalink: every reader sees the same view.

A URL without runs shows up to MAX_RUNS runs of the study, the newest seeds first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args
from urllib.parse import parse_qs, urlencode

from pipeline.recipe import is_baseline
from pipeline.report.stores import StoredRun, StoredStudy

View = Literal["costs", "learning", "time", "gradients", "claims", "runs"]
VIEWS: dict[View, str] = {
    "costs": "Savings and costs",
    "learning": "Learning curves",
    "time": "Where the time goes",
    "gradients": "Gradients and firing rates",
    "claims": "Claims and memory against time steps",
    "runs": "Hardware and commits",
}
# The state filter of the list. A silent run is neither running nor known to have ended.
Only = Literal["all", "running", "finished", "failed"]
ONLY: dict[Only, tuple[str, frozenset[str]]] = {
    "all": ("all", frozenset()),
    "running": ("running", frozenset({"running"})),
    "finished": ("finished", frozenset({"finished"})),
    "failed": ("diverged, failed or stopped", frozenset({"diverged", "failed", "stopped"})),
}
SORTS = {
    "study": "study",
    "family": "family",
    "rules": "rules",
    "seeds": "seeds",
    "runs": "runs",
    "newest": "newest report",
}
_DESCENDING_FIRST = ("newest", "runs", "seeds")
MAX_RUNS = 24  # the most runs of a study that are shown if the URL names none


@dataclass(frozen=True, kw_only=True)
class ViewState:
    study: str = ""  # the study key
    family: str = ""  # the experiment; several experiments may have the same study key
    runs: tuple[str, ...] | None = None  # short ids of the picked runs; None: see `picked`
    view: View = "costs"
    text: str = ""  # the text filter: a listed study has each word in some column
    only: Only = "all"
    sort: str = "newest"
    descending: bool = True

    @classmethod
    def at(cls, search: str) -> Self:
        """Parse the query of a URL. Wrong values become defaults."""
        try:
            fields = parse_qs(search.lstrip("?"), max_num_fields=20)
        except ValueError:  # the query has more fields than any of our URLs
            return cls()
        query = {name: values[-1] for name, values in fields.items()}
        ids = tuple(each for each in query.get("runs", "").split(".") if each not in ("", "none"))
        return cls(
            study=query.get("study", "")[:64],
            family=query.get("family", "")[:250],
            runs=ids if "runs" in query else None,
            view=_value_or_default(query.get("view"), get_args(View), "costs"),
            text=query.get("text", "")[:200],
            only=_value_or_default(query.get("only"), get_args(Only), "all"),
            sort=_value_or_default(query.get("sort"), tuple(SORTS), "newest"),
            descending=query.get("order") != "up",
        )

    @property
    def search(self) -> str:
        """Return the query, without defaults."""
        fields: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("study", "family", "view", "text", "only", "sort")
            if getattr(self, name) != getattr(ViewState, name)
        }
        if self.runs is not None:
            fields["runs"] = ".".join(self.runs) or "none"
        if not self.descending:
            fields["order"] = "up"
        return f"?{urlencode(fields)}" if fields else ""

    def at_study(self, study: StoredStudy) -> Self:
        if (self.study, self.family) == (study.study, study.experiment):
            return self
        return replace(self, study=study.study, family=study.experiment, runs=None)

    def sorted_by(self, column: str) -> Self:
        if self.sort == column:
            return replace(self, descending=not self.descending)
        return replace(self, sort=column, descending=column in _DESCENDING_FIRST)

    def listed(self, studies: Sequence[StoredStudy]) -> list[StoredStudy]:
        states, words = ONLY[self.only][1], self.text.lower().split()
        listed: list[StoredStudy] = []
        for study in studies:
            names = [study.study, study.experiment, *study.rules, study.protocol, *study.seeds]
            text = " ".join([*names, describe_states(dict(study.states))]).lower()
            if (not states or states & study.states.keys()) and all(each in text for each in words):
                listed.append(study)
        return sorted(listed, key=lambda each: _sort_key(each, self.sort), reverse=self.descending)

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


def describe_states(states: dict[str, int]) -> str:
    """A text such as `3 finished, 1 running, 1 silent`."""
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items()))


def _sort_key(study: StoredStudy, column: str) -> Any:
    return {
        "study": study.study,
        "family": study.experiment.lower(),
        "rules": (len(study.rules), study.rules),
        "seeds": len(study.seeds),
        "runs": sum(study.states.values()),
        "newest": study.newest,
    }[column]
