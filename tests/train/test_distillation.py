"""Distillation against formulas in float64: alone, over time, and under the rules that call it."""

# T time, B batch, K classes

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.models.teachers.timm import timm_teacher
from pipeline.recipe.recipe import spec
from pipeline.rules.base import Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.opzo import OPZO
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.state import fresh_state
from pipeline.train.build import check_recipe
from pipeline.train.distillation import Distillation
from pipeline.train.objective import CrossEntropy
from tests.helpers.rule_networks import CLASSES, batch, difference, gradients, learn, lif_network
from tests.helpers.small import small_recipe

ONLY_TEACHER: Any = {"label_weight": 0.0}
TIME = 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


TARGET = torch.tensor([2, 0, 1, 1, 2])
TEACHER = draw(5, CLASSES, seed=1)


def softmax(logits: Tensor, tau: float) -> list[list[float]]:
    """By hand, with Python's numbers."""
    rows = [[math.exp(value / tau) for value in row] for row in logits.tolist()]
    return [[value / sum(row) for value in row] for row in rows]


def by_hand(form: str, teacher: Tensor, student: Tensor, tau: float) -> float:
    total = 0.0
    for p, q in zip(softmax(teacher, tau), softmax(student, tau), strict=True):
        total += sum(
            a * ((math.log(a) if form == "kl" else 0.0) - math.log(b))
            for a, b in zip(p, q, strict=True)
        )
    return tau**2 * total / len(teacher)


@pytest.mark.parametrize("tau", [1.0, 3.0])
@pytest.mark.parametrize("form", ["soft", "kl"])
def test_soft_answers_are_learnt_as_the_formula_says(form: Any, tau: float) -> None:
    student = draw(5, CLASSES)
    loss_of = Distillation(**ONLY_TEACHER, form=form, temperature=tau)(TARGET, TEACHER)
    assert float(loss_of(student)) == pytest.approx(by_hand(form, TEACHER, student, tau), abs=1e-12)


@pytest.mark.parametrize("tau", [1.0, 3.0])
@pytest.mark.parametrize("form", ["soft", "kl"])
def test_a_student_that_answers_as_the_teacher_is_at_the_minimum(form: Any, tau: float) -> None:
    """Also one whose logits are shifted: answers are probabilities. The soft cross-entropy ends at
    the teacher's entropy.
    """
    loss_of = Distillation(**ONLY_TEACHER, form=form, temperature=tau)(TARGET, TEACHER)
    student = (TEACHER + 0.7).requires_grad_()
    loss = loss_of(student)
    (gradient,) = torch.autograd.grad(loss, student)
    entropy = -sum(p * math.log(p) for row in softmax(TEACHER, tau) for p in row) / len(TEACHER)
    assert float(gradient.abs().max()) < 1e-15
    assert float(loss.detach()) == pytest.approx(
        tau**2 * entropy if form == "soft" else 0.0, abs=1e-12
    )
    assert all(
        float(loss_of(TEACHER + draw(5, CLASSES, seed=seed))) > float(loss.detach())
        for seed in range(2, 12)
    )


def test_tau_squared_keeps_the_gradient_as_large_as_the_logits_differ() -> None:
    """For large tau the gradient tends to (z - teacher, both without their means) / K, whatever tau
    (Hinton et al., eq. 4).
    """
    student = draw(5, CLASSES).requires_grad_()
    loss = Distillation(**ONLY_TEACHER, form="kl", temperature=1e4)(TARGET, TEACHER)(student)
    (gradient,) = torch.autograd.grad(loss, student)
    gap = (
        (student - student.mean(1, keepdim=True) - TEACHER + TEACHER.mean(1, keepdim=True)).detach()
        / CLASSES
        / len(TEACHER)
    )
    assert torch.allclose(gradient, gap, atol=1e-4)


def test_hard_distillation_learns_the_teachers_class() -> None:
    student = draw(5, CLASSES)
    labels = CrossEntropy(label_smoothing=0.1)
    found = Distillation(label_weight=0.5, teacher_weight=0.5, form="hard", labels=labels)(
        TARGET, TEACHER
    )(student)
    q = softmax(student, 1.0)
    hard = (
        -sum(
            math.log(q[row][max(range(CLASSES), key=TEACHER[row].tolist().__getitem__)])
            for row in range(5)
        )
        / 5
    )
    assert float(found) == pytest.approx(
        0.5 * float(labels(TARGET)(student)) + 0.5 * hard, abs=1e-12
    )


def test_no_gradient_reaches_the_teacher() -> None:
    teacher, student = TEACHER.clone().requires_grad_(), draw(5, CLASSES).requires_grad_()
    Distillation(ensemble_weight=1.0)(TARGET, teacher)(student).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_half_precision_is_widened_first() -> None:
    loss = Distillation(ensemble_weight=0.5)(TARGET, TEACHER.bfloat16())(
        draw(5, CLASSES).bfloat16()
    )
    assert loss.dtype == torch.float32


def test_of_the_mean_it_is_at_most_the_mean_of_the_steps() -> None:
    for seed in range(20):
        logits = draw(TIME, 5, CLASSES, seed=seed)
        for form in ("soft", "kl"):
            loss_for = Distillation(**ONLY_TEACHER, form=form)
            steps = torch.stack([loss_for(TARGET, TEACHER)(each) for each in logits]).mean()
            assert float(loss_for(TARGET, TEACHER)(logits.mean(0))) < float(steps)


# ---------------------------------------------------------------------------------------- over time


def logits_of(model: torch.nn.Module, x_TBC: Tensor) -> Tensor:
    with fresh_state(model):
        return model(x_TBC)


def reference(logits_TBK: Tensor, target_B: Tensor, teacher_BK: Tensor, *, tau: float) -> Tensor:
    """mean_t [CE + 0.5 tau^2 KL(teacher || z_t) + 0.25 tau^2 KL(mean of z_1..z_t || z_t)], the last
    mean a constant.
    """
    total = torch.zeros((), dtype=torch.float64)
    for t in range(len(logits_TBK)):
        log_q = F.log_softmax(logits_TBK[t] / tau, -1)
        m = logits_TBK[: t + 1].detach().mean(0)
        total = total + F.cross_entropy(logits_TBK[t], target_B)
        for weight, other in ((0.5, teacher_BK), (0.25, m)):
            total = total + weight * tau**2 * F.kl_div(
                log_q, (other / tau).softmax(-1), reduction="batchmean"
            )
    return total / len(logits_TBK)


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
    wanted = float(reference(logits_of(model, x_TBC).detach(), target_B, TEACHER, tau=2.0))
    rule = make()
    rule.attach(model)
    shares = learn(rule.loss_terms(model, x_TBC, MIXED(target_B, TEACHER), step=3))
    assert float(sum(each.loss for each in shares)) == pytest.approx(wanted, abs=1e-12)


def test_bptt_differentiates_it_as_autograd_does() -> None:
    model, (x_TBC, target_B) = lif_network(decay=0.5), batch(TIME)
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = reference(logits_of(model, x_TBC), target_B, TEACHER, tau=2.0)
    wanted = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    assert difference(gradients(BPTT(), model, x_TBC, MIXED(target_B, TEACHER)), wanted) < 1e-12


def test_each_micro_batch_begins_a_mean_of_its_own() -> None:
    one, other = draw(5, CLASSES, seed=3), draw(5, CLASSES, seed=4)
    MIXED(TARGET, TEACHER)(one)
    assert float(MIXED(TARGET, TEACHER)(other)) == pytest.approx(
        float(reference(other[None], TARGET, TEACHER, tau=2.0)), abs=1e-12
    )


def test_the_loss_over_the_mean_is_of_the_mean_logits() -> None:
    model, (x_TBC, target_B) = lif_network(decay=0.5), batch(TIME)
    rule = BPTT()
    rule.attach(model, over_time="mean")
    loss_for = Distillation(**ONLY_TEACHER, form="kl")
    (found,) = learn(rule.loss_terms(model, x_TBC, loss_for(target_B, TEACHER), step=0))
    wanted = by_hand("kl", TEACHER, logits_of(model, x_TBC).mean(0), 1.0)
    assert float(found.loss) == pytest.approx(wanted, abs=1e-12)


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("kwargs", "said"),
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
)
def test_refuses(kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Distillation(**kwargs)


def tiny_teacher() -> Any:
    from pipeline.models.teachers.probe import Probe
    from pipeline.models.teachers.weights import Untrained

    return spec(timm_teacher, name="test_resnet", weights=spec(Untrained), probe=spec(Probe))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": spec(Distillation)}, "teacher_weight=1.0 needs a teacher"),
        (
            {"teacher": tiny_teacher()},
            "CrossEntropy: knows labels alone, so a teacher has no effect",
        ),
        (
            {
                "teacher": tiny_teacher(),
                "objective": spec(Distillation, teacher_weight=0.0, ensemble_weight=1.0),
            },
            "a teacher has no effect with teacher_weight=0",
        ),
        (
            {
                "objective": spec(Distillation, teacher_weight=0.0, ensemble_weight=1.0),
                "time_steps": 1,
                "rule": spec(SLTT),
            },
            (
                "ensemble_weight .* needs over_time='steps' and time_steps of 2 or more; got"
                " over_time='steps', time_steps=1"
            ),
        ),
        (
            {
                "objective": spec(Distillation, teacher_weight=0.0, ensemble_weight=1.0),
                "over_time": "mean",
                "rule": spec(BPTT),
            },
            "ensemble_weight .* got over_time='mean'",
        ),
        (
            {"objective": spec(Distillation), "teacher": tiny_teacher(), "over_time": "mean"},
            "SLTT-2: the loss of the mean logits needs all T steps in one graph",
        ),
    ],
)
def test_what_does_not_fit_the_recipe_is_refused_before_a_launch(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        check_recipe(small_recipe(**changes), 1)


def test_a_loss_that_remembers_is_refused_where_a_rule_asks_for_other_losses_between() -> None:
    from pipeline.models.mlp import mlp
    from pipeline.models.transforms import with_readouts

    network = spec(with_readouts, network=spec(mlp, in_features=64, hidden=(8,)))
    objective = spec(Distillation, teacher_weight=0.0, ensemble_weight=1.0)
    recipe = small_recipe(model=network, rule=spec(OPZO, local_readouts=True), objective=objective)
    with pytest.raises(ValueError, match="OPZO-LL: asks for more than one loss a step"):
        check_recipe(recipe, 1)
    check_recipe(small_recipe(model=network, rule=spec(OPZO), objective=objective), 1)
