"""Distillation as an objective: from the logits of a teacher (recipe.teacher), and from the mean of
the network's own logits over time.

T time (steps 1..T), B batch, K classes
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.checks import require
from pipeline.rules.base import LossFn, OverTime
from pipeline.train.objective import CrossEntropy, widened


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A weighted sum, in fp32 or better, for the logits z_t of a step, or for their mean over time:

        label_weight labels(z_t, y)
        + teacher_weight D(teacher, z_t)
        + ensemble_weight tau^2 KL(m_t || z_t)

        "soft"   D = -tau^2 sum_k p_k log q_k   at least tau^2 H(p), the entropy of the answer
        "kl"     D =  tau^2 KL(p || q)          the same gradient, at least 0
        "hard"   D =  CE(z_t, argmax teacher)

    p and q are the softmax of the teacher's logits and of z_t, divided by tau. tau^2 keeps
    gradients as large as at tau = 1 (Hinton et al.). m_t = (z_1 + ... + z_t) / t is a constant: the
    mean of the steps so far teaches each of them.

    With `over_time="steps"` every step learns the teacher's answer, under any rule. With
    `over_time="mean"` the mean logits learn it, if the rule can differentiate that. By convexity
    that loss is never more than the mean over the steps.

        Published               label_weight  teacher_weight  ensemble_weight  form    temperature
        ReActNet, BinaryViT     0             1               0                "soft"  1
        DeiT, hard              1/2           1/2             0                "hard"  -
        DeiT, soft              1 - w         w               0                "kl"    tau
        temporal decoupling     1             a               b                "kl"    1 or 3

    DeiT's code has w/K for w. Temporal decoupling has temperature 1 on ImageNet, 3 on CIFAR. Its
    m_t is the mean over those of all T steps that are right, which a rule that learns while time
    runs cannot know.

    Args:
        labels: the loss on labels. Evaluation reports it whatever its weight.
        temperature: tau > 0, of both soft terms.

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
        for name, acts, rest in (
            ("temperature", self.ensemble_weight > 0 or self.form != "hard", "form='hard'"),
            ("form", self.teacher_weight > 0, "teacher_weight=0"),
            ("labels", self.label_weight > 0, "label_weight=0"),
        ):
            value = getattr(self, name)
            require(
                acts or value == getattr(Distillation, name),
                f"Distillation: {name}={value!r} has no effect with {rest}",
            )

    @property
    def remembers(self) -> bool:
        return self.ensemble_weight > 0

    def check(self, *, taught: bool, over_time: OverTime, time_steps: int) -> None:
        require(
            taught or self.teacher_weight == 0,
            f"Distillation: teacher_weight={self.teacher_weight} needs a teacher,"
            " teacher=spec(timm_teacher, ...); got None",
        )
        require(
            not taught or self.teacher_weight > 0,
            "Distillation: a teacher has no effect with teacher_weight=0; leave it out",
        )
        require(
            not self.remembers or (over_time == "steps" and time_steps >= 2),
            "Distillation: ensemble_weight teaches steps what they answer together, so it needs"
            f" over_time='steps' and time_steps of 2 or more; got over_time={over_time!r},"
            f" time_steps={time_steps}",
        )

    def __call__(self, target_B: Tensor, teacher_BK: Tensor | None = None) -> LossFn:
        assert (teacher_BK is not None) == (self.teacher_weight > 0), (
            "check asks for a teacher where it has a weight"
        )
        on_labels = self.labels(target_B)
        sum_BK: Tensor | None = None
        steps = 0

        def loss_fn(logits_BK: Tensor) -> Tensor:
            nonlocal sum_BK, steps
            z_BK = widened(logits_BK)
            terms = []
            if self.label_weight > 0:
                terms.append(self.label_weight * on_labels(z_BK))
            if teacher_BK is not None:
                answer_BK = teacher_BK.detach().to(z_BK.dtype)
                if self.form == "hard":
                    learnt = F.cross_entropy(z_BK, answer_BK.argmax(-1))
                else:
                    learnt = soft_loss(self.form, answer_BK, z_BK, self.temperature)
                terms.append(self.teacher_weight * learnt)
            if self.remembers:
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
    """`tau^2` times the cross-entropy ("soft") or the divergence ("kl") of two distributions at one
    temperature.
    """
    log_p_BK, log_q_BK = (
        F.log_softmax(each_BK / temperature, dim=-1) for each_BK in (teacher_BK, logits_BK)
    )
    gap_BK = -log_q_BK if form == "soft" else log_p_BK - log_q_BK
    return temperature**2 * (log_p_BK.exp() * gap_BK).sum(-1).mean()
