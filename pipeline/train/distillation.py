"""Distillation as an objective: the network learns from the logits of a teacher (recipe.teacher),
and from the mean of its own logits over time.

T time (steps 1..T), B batch, K classes
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.checks import require
from pipeline.rules.base import LossFn, OverTime
from pipeline.train.objective import CrossEntropy, to_fp32


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A weighted sum, in fp32 or better. z_t are the logits of step t, or their mean over time:

        label_weight labels(z_t, y)
        + teacher_weight D(teacher, z_t)
        + ensemble_weight tau^2 KL(m_t || z_t)

        "soft"   D = -tau^2 sum_k p_k log q_k   its minimum is tau^2 H(p), with the entropy H
        "kl"     D =  tau^2 KL(p || q)          the same gradient; its minimum is 0
        "hard"   D =  CE(z_t, argmax teacher)

    p is the softmax of the teacher's logits divided by tau, q that of z_t divided by tau. tau^2
    keeps gradients as large as at tau = 1 (Hinton et al.). m_t = (z_1 + ... + z_t) / t is the mean
    of the steps so far. m_t has no gradient.

    With `over_time="steps"` every step learns the teacher's prediction, under any rule. With
    `over_time="mean"` the mean logits learn it, if the rule can differentiate their loss. By
    convexity, the loss of the mean logits is at most the mean loss of the steps.

        Published               label_weight  teacher_weight  ensemble_weight  form    temperature
        ReActNet, BinaryViT     0             1               0                "soft"  1
        DeiT, hard              1/2           1/2             0                "hard"  -
        DeiT, soft              1 - w         w               0                "kl"    tau
        temporal decoupling     1             a               b                "kl"    1 or 3

    DeiT's code has w/K in place of w. Temporal decoupling has temperature 1 on ImageNet and 3 on
    CIFAR. Its m_t is the mean over those steps of 1..T whose prediction is correct. An online
    rule cannot compute this mean, because later steps are unknown.

    Args:
        labels: the loss on labels. Evaluation reports it, even if its weight is 0.
        temperature: tau > 0, of the terms that have it.

    Raises: ValueError for a negative weight, no weight above 0 beside that of the labels, another
    form, or a temperature of 0 or below.
    Source: Hinton et al. 2015, arXiv:1503.02531; Liu et al. 2020 (ReActNet), arXiv:2003.03488;
    Touvron et al. 2021 (DeiT), arXiv:2012.12877; temporal decoupling:
    Intelli-Chip-Lab/snn_temporal_decoupling_distillation, 2025.
    """

    label_weight: float = 1.0
    teacher_weight: float = 1.0
    ensemble_weight: float = 0.0
    form: Literal["soft", "kl", "hard"] = "kl"
    temperature: float = 1.0
    labels: CrossEntropy = CrossEntropy()

    def __post_init__(self) -> None:
        for name in ("label_weight", "teacher_weight", "ensemble_weight"):
            weight = getattr(self, name)
            require(weight >= 0, f"Distillation: {name} must not be negative; got {weight}")
        require(
            self.teacher_weight or self.ensemble_weight,
            "Distillation: teacher_weight or ensemble_weight must be above 0; got 0 for both",
        )
        require(
            self.temperature > 0,
            f"Distillation: temperature must be above 0; got {self.temperature}",
        )
        require(
            self.form in ("soft", "kl", "hard"),
            f"Distillation: form must be 'soft', 'kl' or 'hard'; got {self.form!r}",
        )
        for name, has_effect, other in (
            ("temperature", self.ensemble_weight > 0 or self.form != "hard", "form='hard'"),
            ("form", self.teacher_weight > 0, "teacher_weight=0"),
            ("labels", self.label_weight > 0, "label_weight=0"),
        ):
            value = getattr(self, name)
            require(
                has_effect or value == getattr(Distillation, name),
                f"Distillation: {name}={value!r} has no effect with {other}",
            )

    @property
    def is_stateful(self) -> bool:
        return self.ensemble_weight > 0

    def check(self, *, has_teacher: bool, over_time: OverTime, time_steps: int) -> None:
        require(
            has_teacher or self.teacher_weight == 0,
            f"Distillation: teacher_weight={self.teacher_weight} needs a teacher in the recipe,"
            " teacher=spec(timm_teacher, ...); got None",
        )
        require(
            not has_teacher or self.teacher_weight > 0,
            "Distillation: a teacher has no effect with teacher_weight=0; omit the teacher",
        )
        require(
            not self.is_stateful or (over_time == "steps" and time_steps >= 2),
            "Distillation: ensemble_weight teaches each step the mean over steps, so it needs"
            f" over_time='steps' and time_steps of 2 or more; got over_time={over_time!r},"
            f" time_steps={time_steps}",
        )

    def __call__(self, target_B: Tensor, teacher_BK: Tensor | None = None) -> LossFn:
        assert (teacher_BK is not None) == (self.teacher_weight > 0), (
            "`check` requires a teacher exactly if teacher_weight > 0"
        )
        label_loss_of = self.labels(target_B)
        sum_BK: Tensor | None = None
        steps = 0

        def loss_fn(logits_BK: Tensor) -> Tensor:
            nonlocal sum_BK, steps
            z_BK = to_fp32(logits_BK)
            terms = []
            if self.label_weight > 0:
                terms.append(self.label_weight * label_loss_of(z_BK))
            if teacher_BK is not None:
                constant_BK = teacher_BK.detach().to(z_BK.dtype)
                if self.form == "hard":
                    teacher_loss = F.cross_entropy(z_BK, constant_BK.argmax(-1))
                else:
                    teacher_loss = soft_loss(self.form, constant_BK, z_BK, self.temperature)
                terms.append(self.teacher_weight * teacher_loss)
            if self.is_stateful:
                steps += 1
                sum_BK = z_BK.detach() if sum_BK is None else sum_BK + z_BK.detach()
                terms.append(
                    self.ensemble_weight * soft_loss("kl", sum_BK / steps, z_BK, self.temperature)
                )
            return torch.stack(terms).sum()

        return loss_fn


def soft_loss(
    form: Literal["soft", "kl"], teacher_BK: Tensor, logits_BK: Tensor, temperature: float
) -> Tensor:
    """The mean over the batch of tau^2 CE(p, q) ("soft") or tau^2 KL(p || q) ("kl"). p is the
    softmax of the teacher's logits divided by tau, q that of `logits_BK` divided by tau.
    """
    log_p_BK = F.log_softmax(teacher_BK / temperature, dim=-1)
    log_q_BK = F.log_softmax(logits_BK / temperature, dim=-1)
    cost_BK = -log_q_BK if form == "soft" else log_p_BK - log_q_BK
    return temperature**2 * (log_p_BK.exp() * cost_BK).sum(-1).mean()
