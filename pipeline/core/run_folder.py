"""The paths of the files in a run's folder. No other module builds these paths."""

import os
from pathlib import Path
from typing import Literal

ExportFormat = Literal["plain", "packed", "nir", "torch", "torch-step"]

_EXPORTS: dict[ExportFormat, str] = {
    "plain": "weights.safetensors",
    "packed": "weights-packed.safetensors",
    "nir": "network.nir",
    "torch": "network.pt2",
    "torch-step": "network-step.pt2",
}


class RunFolder:
    """The paths of the files and folders that a run may have. This class creates none of them."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        # Written by the launch
        self.recipe = self.path / "recipe.json"
        self.code = self.path / "code.json"  # folders of the user's packages that the recipe names
        self.job = self.path / "job.json"  # what the workers need in addition to the recipe
        self.cluster = self.path / "cluster.json"  # the options of the launch
        self.launch_log = self.path / "launch.log"  # output of the driver, for runs side by side
        # Written by the run
        self.journal = self.path / "journal.jsonl"  # events: see track/events.py
        self.system = self.path / "system.jsonl"  # events with the load of the driver's machine
        self.summary = self.path / "summary.json"  # results of a finished run
        self.activity = self.path / "activity.json"  # final firing rates of each layer
        self.predictions = self.path / "answers.npz"  # predictions of the last evaluation
        # Of a fine-tuned run: its confusion, and the pictures of its worst mistakes
        self.mistakes = self.path / "mistakes.json"
        self.checkpoints = self.path / "checkpoints"  # folder, unless the job names an address
        self.decisions = self.path / "decisions.json"  # rollbacks, skipped batches, micro-batch
        # Locks, held by live processes
        self.driver_lock = self.path / "driver.lock"
        self.writer_lock = self.path / "writer.lock"  # of rank 0
        # Messages between processes
        self.stop_request = self.path / "stop"  # to save and stop; may name the requester
        self.save_request = self.path / "save"  # to save and continue; may name nodes that leave
        self.refusal = self.path / "refusal.json"  # why the next attempt must not begin
        self.worker_death = self.path / "died.json"  # of one worker, not yet in the journal
        self.stacks = self.path / "stacks"  # folder: thread stacks of workers that hung

        # MLflow artifacts, besides the journal: from the start, and of a finished run
        self.early_artifacts = (self.recipe,)
        self.late_artifacts = (self.summary, self.activity, self.predictions)

    def export(self, format: ExportFormat) -> Path:
        """The file of `spiketrain export`."""
        return self.path / _EXPORTS[format]
