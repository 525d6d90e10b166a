"""What an address shows, and the address of what is shown: whoever opens it sees the same.

One that names no runs shows those that there are by then, of many the newest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args
from urllib.parse import parse_qs, urlencode

from pipeline.recipe import is_baseline
from pipeline.report.store import StoredRun, StoredStudy

View = Literal["costs", "learning", "time", "gradients", "claims", "runs"]
VIEWS: dict[View, str] = {
    "costs": "Savings and costs",
    "learning": "Learning curves",
    "time": "Where the time goes",
    "gradients": "Gradients and firing rates",
    "claims": "Claims and memory against time steps",
    "runs": "Hardware and commits",
}
Only = Literal["all", "running", "finished", "failed"]
ONLY: dict[Only, tuple[str, frozenset[str]]] = {
    "all": ("all", frozenset()),
    "running": ("going on", frozenset({"running"})),
    "finished": ("finished", frozenset({"finished"})),
    "failed": ("diverged, failed or stopped", frozenset({"diverged", "failed", "stopped"})),
}
"""the states of which a study has to have one; a run that is silent neither goes on nor is known to
have ended
"""
SORTS = ("study", "family", "rules", "seeds", "runs", "newest")
_ID = 8  # letters of a run's id
MOST = 24
"""runs that are picked of a study, at most, where an address names none"""


@dataclass(frozen=True, kw_only=True)
class Place:
    study: str = ""
    """its key"""
    family: str = ""
    """its experiment: one key may be in several"""
    runs: tuple[str, ...] | None = None
    """the beginnings of the ids of those picked; None: all, or the newest seeds of more than
    MOST
    """
    view: View = "costs"
    text: str = ""
    """that a study listed has in one of its columns"""
    only: Only = "all"
    sort: str = "newest"
    descending: bool = True

    @classmethod
    def at(cls, search: str | None) -> Place:
        """Of the query of an address, of which nothing is trusted."""
        try:
            asked = {
                name: values[-1]
                for name, values in parse_qs((search or "").lstrip("?"), max_num_fields=20).items()
            }
        except ValueError:  # more fields than any of ours has
            return cls()
        view: View = next((name for name in get_args(View) if name == asked.get("view")), "costs")
        only: Only = next((name for name in get_args(Only) if name == asked.get("only")), "all")
        sort = asked.get("sort")
        return cls(
            study=asked.get("study", "")[:64],
            family=asked.get("family", "")[:250],
            runs=(
                tuple(name for name in asked["runs"].split(".") if name and name != "none")
                if "runs" in asked
                else None
            ),
            view=view,
            text=asked.get("text", "")[:200],
            only=only,
            sort=sort if sort in SORTS else "newest",
            descending=asked.get("order", "down") == "down",
        )

    @property
    def search(self) -> str:
        """The query, without what goes without saying."""
        plain = Place()
        said: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("study", "family", "view", "text", "only", "sort")
            if getattr(self, name) != getattr(plain, name)
        }
        if self.runs is not None:
            said["runs"] = ".".join(self.runs) or "none"
        if not self.descending:
            said["order"] = "up"
        return f"?{urlencode(said)}" if said else ""

    def change(self, **changes: Any) -> Place:
        return replace(self, **changes)

    def listed(self, studies: Sequence[StoredStudy]) -> list[StoredStudy]:
        """Those that the filter leaves, sorted."""
        states, words = ONLY[self.only][1], self.text.lower().split()
        kept = [
            study
            for study in studies
            if (not states or states & study.states.keys())
            and all(word in _words(study) for word in words)
        ]
        return sorted(kept, key=lambda study: _sorted_by(study, self.sort), reverse=self.descending)

    def picked(self, runs: Sequence[StoredRun]) -> list[StoredRun]:
        """Of the runs of the study."""
        members = self.members(runs)
        if self.runs is None:
            return _newest_seeds(members)
        return [run for run in members if short(run) in self.runs]

    def members(self, runs: Sequence[StoredRun]) -> list[StoredRun]:
        return [run for run in runs if self.family in ("", run.experiment)]


def short(run: StoredRun) -> str:
    return run.id[:_ID]


def _newest_seeds(members: Sequence[StoredRun]) -> list[StoredRun]:
    """All, or of more than MOST the newest seeds, each whole; in any case the baseline of the
    newest seed that has one.

    Of a newest seed that is larger than that, its newest runs.
    """
    if len(members) <= MOST:
        return list(members)
    by_seed: dict[str, list[StoredRun]] = {}
    for run in members:
        by_seed.setdefault(run.seed, []).append(run)
    bases = [[run.id for run in runs if is_baseline(run.rule)] for runs in by_seed.values()]
    kept = set(next(filter(None, bases), [])[:MOST])
    for place, runs in enumerate(by_seed.values()):
        more = [run.id for run in runs if run.id not in kept]
        room = MOST - len(kept)
        if len(more) > room:
            kept.update(more[:room] if place == 0 else ())
            break
        kept.update(more)
    return [run for run in members if run.id in kept]


def states_words(study: StoredStudy) -> str:
    """`3 finished, 1 running, 1 silent`"""
    return ", ".join(f"{count} {state}" for state, count in sorted(study.states.items()))


def _words(study: StoredStudy) -> str:
    return " ".join(
        [
            study.study,
            study.experiment,
            *study.rules,
            study.protocol,
            *study.seeds,
            states_words(study),
        ]
    ).lower()


def _sorted_by(study: StoredStudy, column: str) -> Any:
    return {
        "study": study.study,
        "family": study.experiment.lower(),
        "rules": (len(study.rules), study.rules),
        "seeds": len(study.seeds),
        "runs": sum(study.states.values()),
        "newest": study.newest,
    }[column]
