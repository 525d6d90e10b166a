"""The files of a run's folder that MLflow keeps as artifacts."""

from __future__ import annotations

import hashlib
from pathlib import Path

AT_ONCE = ("recipe.json",)
AT_THE_END = ("summary.json", "activity.json", "answers.npz")
JOURNAL = "journal.jsonl"
KNOWN = (*AT_ONCE, JOURNAL, *AT_THE_END)
"""every artifact of a run"""

JOURNAL_DUE = ("start", "evaluation", "fidelity", "finish", "stopped", "failed", "diverged")
"""events after which the journal is sent while the run goes on"""


def digests(run_dir: Path, *, is_finished: bool) -> dict[str, str]:
    """A digest of each file that is due and there, by its name; the journal is none of them."""
    due = (run_dir / name for name in (*AT_ONCE, *(AT_THE_END if is_finished else ())))
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for file in due
        if file.exists()
    }
