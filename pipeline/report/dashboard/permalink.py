"""The mapping between a URL and a view. The URL is a permalink: everybody sees the same view.

A URL that names no runs shows all runs of the study, at most the newest MOST.
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
    "running": ("going on", frozenset({"running"})),
    "finished": ("finished", frozenset({"finished"})),
    "failed": ("diverged, failed or stopped", frozenset({"diverged", "failed", "stopped"})),
}
SORTS = {
    "study": "study",
    "family": "family",
    "rules": "rules",
    "seeds": "seeds",
    "runs": "runs",
    "newest": "newest sign of life",
}
_DOWN_FIRST = ("newest", "runs", "seeds")
MOST = 24  # the most runs of a study that are shown if the URL names none


@dataclass(frozen=True, kw_only=True)
class ViewState:
    study: str = ""  # the study key
    family: str = ""  # the experiment: one key may be in several
    runs: tuple[str, ...] | None = None  # short ids of the picked runs; None: all, or the newest
    view: View = "costs"
    text: str = ""  # the text filter: a listed study has it in one of its columns
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
            view=_among(get_args(View), query.get("view"), "costs"),
            text=query.get("text", "")[:200],
            only=_among(get_args(Only), query.get("only"), "all"),
            sort=_among(tuple(SORTS), query.get("sort"), "newest"),
            descending=query.get("order", "down") == "down",
        )

    @property
    def search(self) -> str:
        """Return the query, without defaults."""
        plain = ViewState()
        fields: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("study", "family", "view", "text", "only", "sort")
            if getattr(self, name) != getattr(plain, name)
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
        """Sort by a column. The second call reverses the order."""
        down = not self.descending if self.sort == column else column in _DOWN_FIRST
        return replace(self, sort=column, descending=down)

    def listed(self, studies: Sequence[StoredStudy]) -> list[StoredStudy]:
        """The studies that pass the filter, sorted."""
        states, words = ONLY[self.only][1], self.text.lower().split()
        kept: list[StoredStudy] = []
        for study in studies:
            names = [study.study, study.experiment, *study.rules, study.protocol, *study.seeds]
            text = " ".join([*names, describe_states(dict(study.states))]).lower()
            if (not states or states & study.states.keys()) and all(each in text for each in words):
                kept.append(study)
        return sorted(kept, key=lambda study: _key(study, self.sort), reverse=self.descending)

    def picked(self, runs: Sequence[StoredRun]) -> list[StoredRun]:
        """The runs of the study that are shown. `runs`: all runs of the study, newest first.

        Without a choice, these are the runs of the newest seeds, at most MOST. Within a
        seed a baseline comes first. Of the oldest of these seeds some runs may be left out.
        """
        members = self.members(runs)
        if self.runs is not None:
            return [run for run in members if run.short in self.runs]
        seeds = list(dict.fromkeys(run.seed for run in members))
        by_seed = sorted(
            members, key=lambda run: (seeds.index(run.seed), not is_baseline(run.rule))
        )
        kept = {run.id for run in by_seed[:MOST]}
        return [run for run in members if run.id in kept]

    def members(self, runs: Sequence[StoredRun]) -> list[StoredRun]:
        return [run for run in runs if self.family in ("", run.experiment)]


def _among(known: tuple[Any, ...], value: str | None, default: str) -> Any:
    return value if value in known else default


def describe_states(states: dict[str, int]) -> str:
    """A text such as `3 finished, 1 running, 1 silent`."""
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items()))


def _key(study: StoredStudy, column: str) -> Any:
    return {
        "study": study.study,
        "family": study.experiment.lower(),
        "rules": (len(study.rules), study.rules),
        "seeds": len(study.seeds),
        "runs": sum(study.states.values()),
        "newest": study.newest,
    }[column]
