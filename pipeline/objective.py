"""From logits to the scalar that is minimised.

A recipe's objective is a value: called with the targets of one micro-batch it gives a fresh `loss_of`, which a rule then
calls on logits, once per time step in time order (`over_time="steps"`) or once on the mean (`"mean"`).

A target is a class, int64 [B], or, of samples that were mixed, each class's share, float [B,K].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.rules.base import LossOf


class Loss(Protocol):
    """Targets [B] -> (logits [B,K] -> scalar, the mean over the batch)."""

    def __call__(self, target_B: Tensor) -> LossOf: ...


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """`(1 - mse) * CE(logits, target) + mse * MSE(logits, goal)`, in fp32 or better.

    Args:
        label_smoothing: share of the target's probability that is spread over all classes.
        mse: weight of the regulariser on the raw logits; 0 leaves it out.
        goal: what the regulariser pulls logits to: a constant 1 for every class, or the target as shares of the classes.

    Source: Meng et al. 2023 (SLTT), arXiv:2302.14311; the constant goal goes back to Deng et al. 2022 (TET), arXiv:2202.11946.
    """

    label_smoothing: float = 0.0
    mse: float = 0.0
    goal: Literal["ones", "one_hot"] = "ones"

    def __post_init__(self) -> None:
        for name in ("label_smoothing", "mse"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"CrossEntropy: {name} must be in 0..1; got {getattr(self, name)}")
        if self.goal != "ones" and self.mse == 0:
            raise ValueError(f"CrossEntropy: goal={self.goal!r} has no effect with mse=0")

    def __call__(self, target_B: Tensor) -> LossOf:
        def loss_of(logits_BK: Tensor) -> Tensor:
            logits_BK = logits_BK.to(torch.promote_types(logits_BK.dtype, torch.float32))
            wanted = target_B if target_B.dim() == 1 else target_B.to(logits_BK.dtype)
            loss = F.cross_entropy(logits_BK, wanted, label_smoothing=self.label_smoothing)
            if self.mse == 0:
                return loss
            if self.goal == "ones":
                goal_BK = torch.ones_like(logits_BK)
            else:
                goal_BK = wanted if wanted.dim() == 2 else F.one_hot(wanted, logits_BK.shape[-1]).to(logits_BK.dtype)
            return (1 - self.mse) * loss + self.mse * F.mse_loss(logits_BK, goal_BK)

        return loss_of
