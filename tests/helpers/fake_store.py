"""A store in memory, of runs by hand: what a dashboard asks, without MLflow."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.report.claims import Claim, SuiteReport
from pipeline.report.stores import ArtifactError, Point, SentJournal, StoredRun, StoreError
from pipeline.track.mlflow_store import PARENT_OF
from tests.helpers.events import typed
from tests.helpers.hand_made import KEY, LAYERS, events, recipe, run


@dataclass
class FakeStore:
    """See `Store`. `trouble` is raised at each question while it is there, `refused` at each for
    the artifacts of a run by its id; `every` says how each journal was thinned; `asked` has each
    question; each takes `pause_s`.
    """

    members: list[StoredRun] = field(default_factory=list)
    texts: dict[tuple[str, str], str] = field(default_factory=dict)
    histories: dict[tuple[str, str], list[Point]] = field(default_factory=dict)
    trouble: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    pause_s: float = 0.0
    every: int = 1
    asked: list[tuple[Any, ...]] = field(default_factory=list)

    def runs(self) -> list[StoredRun]:
        self._ask("runs")
        return list(self.members)

    def history(self, run_id: str, metric: str, *, since: int = -1) -> list[Point]:
        self._ask("history", run_id, metric, since)
        return [point for point in self.histories.get((run_id, metric), []) if point.step > since]

    def text(self, run_id: str, name: str) -> str | None:
        self._ask("text", run_id, name)
        if run_id in self.refused:
            raise ArtifactError(self.refused[run_id])
        return self.texts.get((run_id, name))

    def journal(self, run_id: str) -> SentJournal:
        lines = (self.text(run_id, "journal.jsonl") or "").splitlines()
        return SentJournal(events=[typed(json.loads(line)) for line in lines], every=self.every)

    def _ask(self, *what: Any) -> None:
        time.sleep(self.pause_s)
        if self.trouble:
            raise StoreError(self.trouble)
        self.asked.append(what)

    def add(self, name: str, **about: Any) -> StoredRun:
        """A run of which nothing but its tags is known."""
        known: dict[str, Any] = {"study": KEY, "rule": "BPTT", "seed": "0"}
        tags = {f"spiketrain.{key}": about.pop(key, value) for key, value in known.items()}
        if parent := about.pop("parent", None):
            tags[PARENT_OF] = parent
        about = {
            "experiment": "fashion",
            "status": "FINISHED",
            "started": 1000.0,
            "newest": 2000.0,
            "metrics": {},
        } | about
        made = StoredRun(
            id=(name * 32)[:32], name=name, **{**about, "tags": tags | about.pop("tags", {})}
        )
        self.members = [made, *(each for each in self.members if each.id != made.id)]
        return made

    def add_finished(
        self,
        name: str,
        rule: str,
        *,
        seed: int = 0,
        top1: float = 0.9,
        workers: int = 1,
        **about: Any,
    ) -> StoredRun:
        """A run that has ended and left its artifacts, as hand_made.py has them."""
        made = self.add(name, rule=rule, seed=str(seed), **about)
        summary = run(rule, seed=seed, top1=top1, study=made.study, world_size=workers).summary
        files = {
            "summary.json": summary,
            "activity.json": LAYERS,
            "recipe.json": {"version": 1, "recipe": recipe(rule)},
        }
        self._write(made, files, events(rule, seed=seed, top1=top1))
        return made

    def add_unfinished(self, name: str, rule: str, *, state: str) -> StoredRun:
        """A run that is half done, and still `running`, or `diverged`."""
        status, tags = {
            "running": ("RUNNING", {}),
            "diverged": ("FAILED", {"spiketrain.diverged": "true"}),
        }[state]
        made = self.add(name, rule=rule, status=status, tags=tags, newest=time.time())
        files = {"recipe.json": {"version": 1, "recipe": recipe(rule)}}
        self._write(made, files, events(rule)[:4])
        return made

    def _write(
        self, made: StoredRun, files: dict[str, Any], journal: Sequence[dict[str, Any]]
    ) -> None:
        lines = [
            {**event, "study": made.study} if event["event"] == "start" else event
            for event in journal
        ]
        self.texts[made.id, "journal.jsonl"] = "".join(json.dumps(each) + "\n" for each in lines)
        self.texts |= {(made.id, file): json.dumps(value) for file, value in files.items()}

    def add_report(
        self, parent: str, *claims: Claim, sweeps: tuple[Any, ...] = (), printed: str = ""
    ) -> None:
        """What a suite's own report returned and printed."""
        report = SuiteReport(claims=claims, sweeps=sweeps, printed=printed)
        self.texts[parent, "report.json"] = json.dumps(report.to_json())
