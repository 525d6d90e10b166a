"""What the rule says of its last batch, which may be one of an earlier attempt: then the checkpoint
has told it.
"""

from __future__ import annotations

import math

import torch

from pipeline.train.context import TrainContext


class Figures:
    """Of one attempt; every rank asks its own equally often."""

    def __init__(self, parts: TrainContext) -> None:
        self.parts = parts
        self._earlier: dict[str, float] = (
            {} if parts.trainer is None else parts.trainer.get("figures", {})
        )

    def now(self) -> dict[str, float]:
        """The mean over ranks; without what no batch has given. Collective."""
        figures = self.parts.rule.metrics()
        if not figures:
            return {}
        means = self.parts.ranks.mean(
            torch.tensor(list(figures.values()), dtype=torch.float64, device=self.parts.device)
        )
        known = {
            name: mean
            for name, mean in zip(figures, means.tolist(), strict=True)
            if not math.isnan(mean)
        }
        told = {**self._earlier, **known}
        return {name: told[name] for name in figures if name in told}
