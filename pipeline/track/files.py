"""The files of a run's folder that MLflow keeps as artifacts, each sent once and again when it has changed.

A tag beside the artifact says which version was sent: a digest, or for the journal the event up to which it was due. It is
written after the artifact, so that a deliverer that dies between the two has sent it twice at worst, over itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from pipeline.track.jsonl import Event

AT_ONCE = ("recipe.json",)
AT_THE_END = ("summary.json", "activity.json", "answers.npz")
JOURNAL = "journal.jsonl"
KNOWN = (*AT_ONCE, JOURNAL, *AT_THE_END)
"""every artifact of a run"""

_DUE = ("start", "evaluation", "fidelity", "finish", "stopped", "failed", "diverged")
_TAG = "spiketrain.artifact."

Send = Callable[[Path, str, str], None]
"""called with a file, and the tag and its value that say that it was sent"""


class Files:
    """What is due of one run's folder, while its journal is read."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._digests: dict[str, tuple[tuple[int, int], str]] = {}  # name -> size and time of the file, its digest
        self._newest = self._journal_due = ""

    def read(self, event: Event) -> None:
        """An event of the journal, in its order."""
        self._newest = f"{event['event']} {event.get('time')}"
        if event["event"] in _DUE:
            self._journal_due = self._newest

    def send(self, tags: dict[str, str], send: Send, *, status: str) -> None:
        """Send what is due and not in `tags` already; `status` is the run's in MLflow."""
        due = {name: self._digest(name) for name in (*AT_ONCE, *(AT_THE_END if status == "FINISHED" else ()))}
        due[JOURNAL] = self._journal_due if status == "RUNNING" else self._newest or self._journal_due
        for name, version in due.items():
            if version and tags.get(_TAG + name) != version:
                send(self._run_dir / name, _TAG + name, version)

    def _digest(self, name: str) -> str:
        """Of a file as it is now; empty where there is none."""
        path = self._run_dir / name
        try:
            facts = path.stat()
            version = (facts.st_size, facts.st_mtime_ns)
            if name not in self._digests or self._digests[name][0] != version:
                self._digests[name] = version, hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        except FileNotFoundError:
            return ""
        return self._digests[name][1]
