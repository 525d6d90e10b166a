"""How a person goes on with what a list shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.job import resume_command
from pipeline.suite import FILE as SUITE

ADDRESS = "ADDRESS"
"""stands for that of a Ray cluster, which whoever resumes has to know: a folder does not say whom a token is shown to"""


def how_to_resume(folder: Path, *, trust: Sequence[str] = ()) -> str:
    """The command, of a run's folder or of a suite's; with `--address ADDRESS` for what was launched on a cluster."""
    address = ADDRESS if _was_on_a_cluster(folder) else None
    return resume_command(folder.parent, folder.name, trust=trust, address=address)


def _was_on_a_cluster(folder: Path) -> bool:
    suite = folder / SUITE
    try:
        told = json.loads(suite.read_bytes())["cluster"] if suite.exists() else json.loads((folder / "cluster.json").read_bytes())
        return told["address"] is not None
    except (OSError, ValueError, KeyError, TypeError):  # damaged, which a resume says in a line
        return False
