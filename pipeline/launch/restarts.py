"""How often the workers of a run are started again: so many times without getting on, as decided in Ray Train's controller.

Ray's own policy (2.60) counts over the whole of a run, so that the fourth worker that dies in days of training would end it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.train import FailureConfig
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy

from pipeline.damaged import FILE as DAMAGED
from pipeline.fitting import FILE as MICRO_BATCH
from pipeline.track.jsonl import last


class Restarts(DefaultFailurePolicy):
    """`max_failures` deaths end the run in `folder` where there is nothing new between them.

    New is a checkpoint of a step that none was of before, a smaller micro-batch, and a page that is left out.
    """

    def __init__(self, config: FailureConfig, *, folder: Path) -> None:
        super().__init__(config)
        self.folder = folder
        self._saved, self._changed = self._newest(), self._changes()

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        saved, changed = self._newest(), self._changes()
        if saved > self._saved or changed != self._changed:
            self._worker_group_failures = 0
        self._saved, self._changed = max(saved, self._saved), changed
        return super().make_decision(training_failed_error)

    def _newest(self) -> int:
        event = last(self.folder / "journal.jsonl", "checkpoint")
        return -1 if event is None else int(event["step"])

    def _changes(self) -> list[bytes]:
        files = (self.folder / name for name in (MICRO_BATCH, DAMAGED))
        return [file.read_bytes() if file.exists() else b"" for file in files]
