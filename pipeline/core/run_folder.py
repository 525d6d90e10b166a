"""The files of a run's folder: no other module spells out their names."""

import os
from pathlib import Path


class RunFolder:
    """The paths of the files and folders that a run may have. Each is absent until it is needed."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        # What the launch wrote
        self.recipe = self.path / "recipe.json"
        self.code = self.path / "code.json"  # hashes of the user's modules that the recipe names
        self.job = self.path / "job.json"  # what the workers need beside the recipe
        self.cluster = self.path / "cluster.json"  # workers, devices and how they are started
        self.launch_log = self.path / "launch.log"  # output of a launch in the background
        # What the run wrote
        self.journal = self.path / "journal.jsonl"  # events: see track/events.py
        self.system = self.path / "system.jsonl"  # events with the load of the driver's machine
        self.summary = self.path / "summary.json"  # results of a run that finished
        self.activity = self.path / "activity.json"  # firing rates of each layer at the end
        self.answers = self.path / "answers.npz"  # predictions of the last evaluation
        self.checkpoints = self.path / "checkpoints"  # folder, unless the job names an address
        self.mlflow = self.path / "mlflow.json"  # where MLflow has the run, for people
        # Decisions that hold for the rest of the run
        self.micro_batch = self.path / "micro_batch.json"  # upper limit, after memory ran out
        self.skipped = self.path / "skipped.json"  # batches that rollbacks left out
        # Locks, held by live processes
        self.driver_lock = self.path / "driver.lock"
        self.writer_lock = self.path / "writer.lock"  # of rank 0
        # Messages between processes
        self.stop = self.path / "stop"  # save and stop; the content names who asks
        self.save = self.path / "save"  # save and continue; may name machines that will go
        self.refusal = self.path / "refusal.json"  # why the next attempt must not begin
        self.died = self.path / "died.json"  # a worker's death that is not in the journal yet
        self.stacks = self.path / "stacks"  # folder: stacks of the threads of workers that hung

    def weights(self, layout: str) -> Path:
        """The weights that `spiketrain export` writes, in a layout that is not "plain" by name."""
        suffix = "" if layout == "plain" else f"-{layout}"
        return self.path / f"weights{suffix}.safetensors"

    @property
    def early_artifacts(self) -> tuple[Path, ...]:
        """Files that MLflow has as artifacts from the start. It has the journal, too."""
        return (self.recipe,)

    @property
    def late_artifacts(self) -> tuple[Path, ...]:
        """Files that MLflow has as artifacts once the run has finished."""
        return (self.summary, self.activity, self.answers)
