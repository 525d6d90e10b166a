"""Distillation against formulas in float64: alone, over time, and under the rules that call it."""

# T time, B batch, K classes

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.models.mlp import mlp
from pipeline.models.teachers.probe import Probe
from pipeline.models.teachers.timm import timm_teacher
from pipeline.models.teachers.weights import Untrained
from pipeline.models.transforms import with_readouts
from pipeline.recipe.recipe import spec
from pipeline.rules.base import Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.opzo import OPZO
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.train.build import check_recipe
from pipeline.train.distillation import Distillation
from pipeline.train.objective import CrossEntropy
from tests.helpers.rule_networks import (
    CLASSES,
    attached,
    batch,
    difference,
    gradients,
    learn,
    lif_network,
    outputs,
    refusals,
)
from tests.helpers.small import small_recipe

ONLY_TEACHER: Any = {"label_weight": 0.0}
TIME = 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


TARGET = torch.tensor([2, 0, 1, 1, 2])
TEACHER = draw(5, CLASSES, seed=1)


def soft(form: str, teacher: Tensor, student: Tensor, tau: float) -> float:
    """The formula, by torch's own losses."""
    p, log_q = (teacher / tau).softmax(-1), F.log_softmax(student / tau, -1)
    cross_entropy = -(p * log_q).sum(-1).mean()
    divergence = F.kl_div(log_q, p, reduction="batchmean")
    return tau**2 * float(cross_entropy if form == "soft" else divergence)


@pytest.mark.parametrize("tau", [1.0, 3.0])
@pytest.mark.parametrize("form", ["soft", "kl"])
def test_soft_answers_are_learnt_as_the_formula_says(form: Any, tau: float) -> None:
    """A student that answers as the teacher is at the minimum, also one whose logits are shifted:
    answers are probabilities. The soft cross-entropy ends at the teacher's entropy.
    """
    loss_fn = Distillation(**ONLY_TEACHER, form=form, temperature=tau)(TARGET, TEACHER)
    for seed in (0, *range(2, 12)):
        student = draw(5, CLASSES, seed=seed)
        wanted = soft(form, TEACHER, student, tau)
        assert float(loss_fn(student)) == pytest.approx(wanted, abs=1e-12)
    alike = (TEACHER + 0.7).requires_grad_()
    loss = loss_fn(alike)
    (gradient,) = torch.autograd.grad(loss, alike)
    least = soft(form, TEACHER, TEACHER, tau)  # tau^2 times the teacher's entropy, or 0
    assert float(gradient.abs().max()) < 1e-15
    assert float(loss.detach()) == pytest.approx(least, abs=1e-12)
    assert all(float(loss_fn(TEACHER + draw(5, CLASSES, seed=seed))) > least for seed in range(9))


def test_hard_distillation_learns_the_teachers_class() -> None:
    student, labels = draw(5, CLASSES), CrossEntropy(label_smoothing=0.1)
    loss_for = Distillation(label_weight=0.5, teacher_weight=0.5, form="hard", labels=labels)
    hard = F.nll_loss(F.log_softmax(student, -1), TEACHER.argmax(1))
    wanted = 0.5 * float(labels(TARGET)(student)) + 0.5 * float(hard)
    assert float(loss_for(TARGET, TEACHER)(student)) == pytest.approx(wanted, abs=1e-12)


def test_no_gradient_reaches_the_teacher_and_half_precision_is_widened_first() -> None:
    teacher, student = TEACHER.clone().requires_grad_(), draw(5, CLASSES).requires_grad_()
    loss_for = Distillation(ensemble_weight=1.0)
    loss_for(TARGET, teacher)(student).backward()
    assert teacher.grad is None and student.grad is not None
    half = loss_for(TARGET, TEACHER.bfloat16())(draw(5, CLASSES).bfloat16())
    assert half.dtype == torch.float32


# ---------------------------------------------------------------------------------------- over time


def reference(logits_TBK: Tensor, target_B: Tensor, teacher_BK: Tensor, *, tau: float) -> Tensor:
    """mean_t [CE + 0.5 tau^2 KL(teacher || z_t) + 0.25 tau^2 KL(mean of z_1..z_t || z_t)], the last
    mean a constant.
    """
    losses = []
    for t, z_BK in enumerate(logits_TBK):
        losses.append(F.cross_entropy(z_BK, target_B))
        for weight, other in ((0.5, teacher_BK), (0.25, logits_TBK[: t + 1].detach().mean(0))):
            p, log_q = (other / tau).softmax(-1), F.log_softmax(z_BK / tau, -1)
            losses.append(weight * tau**2 * F.kl_div(log_q, p, reduction="batchmean"))
    return torch.stack(losses).sum() / len(logits_TBK)


MIXED = Distillation(teacher_weight=0.5, ensemble_weight=0.25, temperature=2.0)
RULES: list[Callable[[], Rule]] = [
    BPTT,
    lambda: BPTT(chunk=2),
    lambda: BPTT(recompute=True),
    lambda: BPTT(truncate=2),
    SLTT,
    lambda: SLTT(chunk=2),
    lambda: SLTT(k=1),
    OTTT,
]


@pytest.mark.parametrize("make", RULES)
def test_shares_of_every_slice_sum_to_the_loss(make: Callable[[], Rule]) -> None:
    """Steps that SLTT-K reports without a graph move the running mean as well."""
    model, (x_TBC, target_B) = lif_network(decay=0.5), batch(TIME)
    wanted = float(reference(outputs(model, x_TBC), target_B, TEACHER, tau=2.0))
    rule, _ = attached(make(), model)
    shares = learn(rule.loss_terms(model, x_TBC, MIXED(target_B, TEACHER), step=3))
    assert float(sum(each.loss for each in shares)) == pytest.approx(wanted, abs=1e-12)


def test_bptt_differentiates_it_as_autograd_does() -> None:
    model, (x_TBC, target_B) = lif_network(decay=0.5), batch(TIME)
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = reference(outputs(model, x_TBC, grad=True), target_B, TEACHER, tau=2.0)
    wanted = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    assert difference(gradients(BPTT(), model, x_TBC, MIXED(target_B, TEACHER)), wanted) < 1e-12


def test_each_micro_batch_begins_a_mean_of_its_own() -> None:
    one, other = draw(5, CLASSES, seed=3), draw(5, CLASSES, seed=4)
    MIXED(TARGET, TEACHER)(one)
    wanted = float(reference(other[None], TARGET, TEACHER, tau=2.0))
    assert float(MIXED(TARGET, TEACHER)(other)) == pytest.approx(wanted, abs=1e-12)


def test_the_loss_over_the_mean_is_of_the_mean_logits() -> None:
    model, (x_TBC, target_B) = lif_network(decay=0.5), batch(TIME)
    loss_fn = Distillation(**ONLY_TEACHER, form="kl")(target_B, TEACHER)
    rule, _ = attached(BPTT(), model, over_time="mean")
    (found,) = learn(rule.loss_terms(model, x_TBC, loss_fn, step=0))
    wanted = soft("kl", TEACHER, outputs(model, x_TBC).mean(0), 1.0)
    assert float(found.loss) == pytest.approx(wanted, abs=1e-12)


# ----------------------------------------------------------------------------------------- refusals


test_refuses = refusals(
    [
        ({"teacher_weight": -1.0}, "teacher_weight must not be negative"),
        ({"teacher_weight": float("nan")}, "teacher_weight must not be negative"),
        ({"teacher_weight": 0.0}, "teacher_weight or ensemble_weight must be above 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"form": "cosine"}, "form must be 'soft', 'kl' or 'hard'"),
        ({"form": "hard", "temperature": 2.0}, "temperature=2.0 has no effect with form='hard'"),
        (
            {"teacher_weight": 0.0, "ensemble_weight": 1.0, "form": "soft"},
            "form='soft' has no effect with teacher_weight=0",
        ),
        (
            {"label_weight": 0.0, "labels": CrossEntropy(mse=0.1)},
            "labels=.* has no effect with label_weight=0",
        ),
    ],
    Distillation,
)


TEACHER_PART = spec(timm_teacher, name="test_resnet", weights=spec(Untrained), probe=spec(Probe))
ENSEMBLE = spec(Distillation, teacher_weight=0.0, ensemble_weight=1.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": spec(Distillation)}, "teacher_weight=1.0 needs a teacher"),
        ({"teacher": TEACHER_PART}, "CrossEntropy: uses labels alone, so a teacher has no effect"),
        (
            {"teacher": TEACHER_PART, "objective": ENSEMBLE},
            "a teacher has no effect with teacher_weight=0",
        ),
        (
            {"objective": ENSEMBLE, "time_steps": 1, "rule": spec(SLTT)},
            "ensemble_weight .* needs over_time='steps' and time_steps of 2 or more; got"
            " over_time='steps', time_steps=1",
        ),
        (
            {"objective": ENSEMBLE, "over_time": "mean", "rule": spec(BPTT)},
            "ensemble_weight .* got over_time='mean'",
        ),
        (
            {"objective": spec(Distillation), "teacher": TEACHER_PART, "over_time": "mean"},
            "SLTT-2: over_time must be .steps., because the loss of the mean logits needs all T",
        ),
    ],
)
def test_what_does_not_fit_the_recipe_is_refused_before_a_launch(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        check_recipe(small_recipe(**changes), 1)


def test_a_loss_that_remembers_is_refused_where_a_rule_asks_for_other_losses_between() -> None:
    network = spec(with_readouts, network=spec(mlp, in_features=64, hidden=(8,)))
    recipe = small_recipe(model=network, rule=spec(OPZO, local_readouts=True), objective=ENSEMBLE)
    with pytest.raises(ValueError, match="OPZO-LL: needs several losses per step"):
        check_recipe(recipe, 1)
    check_recipe(replace(recipe, rule=spec(OPZO)), 1)
