"""Ray Train's trainer with two policies of ours in its controller, which Ray 2.60 lets nobody choose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.train.torch import TorchTrainer

from pipeline.launch.resizing import Resizing
from pipeline.launch.restarts import Restarts


class Trainer(TorchTrainer):
    """A TorchTrainer of the run in `folder`, with as many workers as one of `sizes` (ascending) says, now and then another.

    `awaits_nodes`: whether nodes may come back or be replaced, which the workers then wait for.
    """

    def __init__(self, *args: Any, sizes: Sequence[int], folder: Path, awaits_nodes: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        failures = self.run_config.failure_config
        assert failures is not None  # Ray's default is one
        several = len(sizes) > 1  # then it is Resizing that waits for nodes
        restarts = Restarts(failures, folder=folder, awaits_nodes=awaits_nodes and not several)
        self._policies: dict[str, Any] = {"failure_policy": restarts}
        if several:
            self._policies["scaling_policy"] = Resizing(self.scaling_config, sizes=sizes, folder=folder)

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        return super()._initialize_and_run_controller(**{**parts, **self._policies})
