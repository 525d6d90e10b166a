"""The objective: the loss that training minimises, as a function of logits and targets.

A recipe's objective is called with the targets of one micro-batch and returns a new `loss_fn`. A
rule calls `loss_fn` on logits: once per time step in time order (`over_time="steps"`), or once on
their mean over time (`"mean"`). Distillation is in distillation.py.

Targets are classes, int64 [B], or, for mixed samples, the shares of the classes, float [B,K].
"""

from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.checks import require
from pipeline.rules.base import LossFn, OverTime


class Loss(Protocol):
    """Maps the targets of a micro-batch, and the teacher's logits if there is a teacher, to a
    `loss_fn`. The `loss_fn` maps logits [B,K] to a scalar, the mean over the batch.

    `labels` is the loss on labels alone, which evaluation reports. `is_stateful` says whether a
    `loss_fn` depends on its earlier calls. A rule must call such a `loss_fn` once per step, in time
    order.
    """

    def __call__(self, target_B: Tensor, teacher_BK: Tensor | None = None) -> LossFn: ...

    @property
    def labels(self) -> "Loss": ...

    @property
    def is_stateful(self) -> bool: ...

    def check(self, *, has_teacher: bool, over_time: OverTime, time_steps: int) -> None:
        """Check that the objective fits the rest of a recipe.

        Raises: ValueError if the objective does not fit.
        """


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """`(1 - mse) * CE(logits, target) + mse * MSE(logits, goal)`, in fp32 or better.

    Args:
        label_smoothing: share of the target's probability that is spread over all classes.
        mse: weight of the squared error of the raw logits, a regulariser, in 0..1; 0: none.
        goal: the logits at which the squared error is 0: "ones" is 1 for every class, "one_hot" is
            1 for the target and 0 for other classes (the shares of the classes for mixed samples).

    Raises: ValueError for a share outside 0..1, or a goal without `mse`.
    Source: Meng et al. 2023 (SLTT), arXiv:2302.14311; the constant goal goes back to Deng et al.
    2022 (TET), arXiv:2202.11946."""

    label_smoothing: float = 0.0
    mse: float = 0.0
    goal: Literal["ones", "one_hot"] = "ones"
    is_stateful = False

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

    def check(self, *, has_teacher: bool, over_time: OverTime, time_steps: int) -> None:
        require(
            not has_teacher,
            "CrossEntropy: uses labels alone, so a teacher has no effect; omit the teacher, or use"
            " Distillation",
        )

    def __call__(self, target_B: Tensor, teacher_BK: Tensor | None = None) -> LossFn:
        assert teacher_BK is None, "check refuses a teacher"

        def loss_fn(logits_BK: Tensor) -> Tensor:
            logits_BK = to_fp32(logits_BK)
            is_mixed = target_B.dim() == 2
            target = target_B.to(logits_BK.dtype) if is_mixed else target_B
            loss = F.cross_entropy(logits_BK, target, label_smoothing=self.label_smoothing)
            if self.mse == 0:
                return loss
            if self.goal == "ones":
                goal_BK = torch.ones_like(logits_BK)
            elif is_mixed:
                goal_BK = target
            else:  # F.one_hot reads the values, which makes the CPU wait for the GPU
                goal_BK = torch.zeros_like(logits_BK).scatter_(1, target[:, None], 1.0)
            return (1 - self.mse) * loss + self.mse * F.mse_loss(logits_BK, goal_BK)

        return loss_fn


def to_fp32(logits: Tensor) -> Tensor:
    """The logits in fp32; float64 stays float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
