"""RUN/mlflow.json: where MLflow has the run, for people. No code relies on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.recipe.json import write_json

NOTE = "mlflow.json"
"""in a run's folder"""


def read_note(run_dir: Path) -> Any:
    """Its content; None where it is missing or damaged."""
    try:
        return json.loads((run_dir / NOTE).read_text())
    except (OSError, ValueError):
        return None


def write_note(run_dir: Path, **note: str) -> None:
    if read_note(run_dir) != note:
        write_json(run_dir / NOTE, note)
