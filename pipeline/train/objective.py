"""The objective: a scalar of the logits that training minimises.

A recipe's objective is a value. Called with the targets of one micro-batch, it returns a new
`loss_fn`, which a rule calls on logits: once per time step in time order (`over_time="steps"`) or
once on the mean (`"mean"`). Distillation is in distillation.py.

A target is a class, int64 [B]. For mixed samples it is each class's share, float [B,K].
"""

from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.checks import require
from pipeline.rules.base import LossFn, OverTime


class Loss(Protocol):
    """Targets [B], and a teacher's logits [B,K] if there is one -> (logits [B,K] -> scalar, the
    mean over the batch).

    `labels` is the loss on labels alone, which evaluation reports. `remembers` says whether a
    `loss_fn` depends on its earlier calls, so that it must be called once per step, in time order.
    """

    def __call__(self, target_B: Tensor, teacher_BK: Tensor | None = None) -> LossFn: ...

    @property
    def labels(self) -> "Loss": ...

    @property
    def remembers(self) -> bool: ...

    def check(self, *, taught: bool, over_time: OverTime, time_steps: int) -> None:
        """Raises: ValueError if the objective does not fit the rest of a recipe."""
        ...


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """`(1 - mse) * CE(logits, target) + mse * MSE(logits, goal)`, in fp32 or better.

    Args:
        label_smoothing: share of the target's probability that is spread over all classes.
        mse: weight of the regulariser on the raw logits; 0 leaves it out.
        goal: the values that the regulariser pulls logits to: a constant 1 for every class, or the
            target as shares of the classes.

    Source: Meng et al. 2023 (SLTT), arXiv:2302.14311; the constant goal goes back to Deng et al.
    2022 (TET), arXiv:2202.11946."""

    label_smoothing: float = 0.0
    mse: float = 0.0
    goal: Literal["ones", "one_hot"] = "ones"
    remembers = False

    def __post_init__(self) -> None:
        for name in ("label_smoothing", "mse"):
            require(
                0 <= getattr(self, name) <= 1,
                f"CrossEntropy: {name} must be in 0..1; got {getattr(self, name)}",
            )
        require(
            self.goal == "ones" or self.mse > 0,
            f"CrossEntropy: goal={self.goal!r} has no effect with mse=0",
        )

    @property
    def labels(self) -> Self:
        return self

    def check(self, *, taught: bool, over_time: OverTime, time_steps: int) -> None:
        require(
            not taught,
            "CrossEntropy: knows labels alone, so a teacher has no effect; leave it out, or use"
            " Distillation",
        )

    def __call__(self, target_B: Tensor, teacher_BK: Tensor | None = None) -> LossFn:
        assert teacher_BK is None, "check refuses a teacher"

        def loss_fn(logits_BK: Tensor) -> Tensor:
            logits_BK = widened(logits_BK)
            wanted = target_B if target_B.dim() == 1 else target_B.to(logits_BK.dtype)
            loss = F.cross_entropy(logits_BK, wanted, label_smoothing=self.label_smoothing)
            if self.mse == 0:
                return loss
            if self.goal == "ones":
                goal_BK = torch.ones_like(logits_BK)
            elif wanted.dim() == 2:
                goal_BK = wanted
            else:  # F.one_hot reads the values, which waits for a GPU
                goal_BK = logits_BK.new_zeros(logits_BK.shape).scatter_(1, wanted[:, None], 1.0)
            return (1 - self.mse) * loss + self.mse * F.mse_loss(logits_BK, goal_BK)

        return loss_fn


def widened(logits: Tensor) -> Tensor:
    """The logits in fp32, or in float64 if they are float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
