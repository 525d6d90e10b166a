"""What a run has decided for all of its attempts: batches to skip, a micro-batch that fits.

Each lies in the run's folder as soon as it is decided. Checkpoints tell of it, for a run whose
folder is lost; what was decided after the newest of them is lost with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core.run_folder import RunFolder
from pipeline.recipe.recipe import read_json, write_json
from pipeline.train.guards.anomaly import Skipped
from pipeline.train.guards.oom import limit_of


def decided(run: Path) -> dict[str, Any]:
    """What the files say that are there, by their names."""
    files = RunFolder(run)
    return {
        file.name: read_json(file) for file in (files.skipped, files.micro_batch) if file.exists()
    }


def adopt(run: Path, told: Mapping[str, Any]) -> None:
    """Write down what a checkpoint tells and the run's folder does not.

    Either may know more: the folder has what was decided after the checkpoint, and a copy of it
    lacks what was decided since. Decisions go one way, so the further one stands.

    Raises: UserError: a file in the folder is damaged.
    """
    files = RunFolder(run)
    if files.skipped.name in told:
        skipped = Skipped.read(run)
        if (further := skipped.further(Skipped.of(told[files.skipped.name]))) != skipped:
            further.write(run)
    if (fits := told.get(files.micro_batch.name)) is not None:
        limit = limit_of(run)
        if limit is None or fits < limit:
            write_json(files.micro_batch, fits)
