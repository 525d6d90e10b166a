"""Where MLflow has a run, beside the run and in its checkpoints, for people. Nothing goes by it, and nothing ends by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.recipe_json import write_json

NOTE = "mlflow.json"
"""in a run's folder"""


def read_note(run_dir: Path) -> Any:
    """What it says; None where there is none, or none that can be read."""
    try:
        return json.loads((run_dir / NOTE).read_text())
    except (OSError, ValueError):
        return None


def write_note(run_dir: Path, **note: str) -> None:
    if read_note(run_dir) != note:
        write_json(run_dir / NOTE, note)
