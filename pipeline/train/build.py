"""What a recipe names, built and refused on one machine alone: its network, its rule on the
network, how it mixes samples.

Nothing here reads a data file or speaks to another process.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from pipeline.data.mixing import Mixing
from pipeline.recipe.recipe import Recipe, Spec, Split
from pipeline.rules.base import Rule, World
from pipeline.train.elastic import check_accumulation, check_sizes, steady
from pipeline.train.gradient_fidelity import Nearness
from pipeline.train.objective import Loss
from pipeline.train.optimizer import build_optimizer
from pipeline.train.part_checks import (
    check_network,
    checked_mixing,
    checked_network,
    checked_objective,
    checked_rule,
    checked_schedule,
)
from pipeline.train.tasks import Task, tasks_of
from pipeline.train.teaching import build_teacher
from pipeline.train.weights import load_start


def check_recipe(recipe: Recipe, *sizes: int) -> nn.Module:
    """Refuse what does not fit together, before anything is launched; needs no data file. The
    network that was made for it.

    `sizes` are the numbers of workers that the run may have.
    """
    check_sizes(recipe, sizes)
    tasks = tasks_of(recipe)
    network = build_network(recipe, tasks)
    if recipe.init is not None:
        load_start(network, Path(recipe.init))
    check_network(network, recipe, tasks[0].data)
    checked_objective(recipe.objective.build(), recipe.objective, classes=tasks[0].data.classes)
    rule = attached_rule(recipe, network, World(recipe.seed, size=sizes[-1]))
    cut = steady(recipe, network, sizes)
    check_accumulation(cut, rule, sizes)
    for size in sizes:
        build_mixing(recipe, cut.split(size))
    if recipe.teacher is not None:
        build_teacher(recipe, tasks[0].data)
    if recipe.evaluation.fidelity_every:
        Nearness.check(recipe, lambda: build_network(recipe, tasks))
    checked_schedule(
        recipe.schedule.build(build_optimizer(recipe, network, rule), 1000, 100), recipe.schedule
    )
    return network


def build_network(recipe: Recipe, tasks: Sequence[Task]) -> nn.Module:
    """The recipe's network, with fresh weights, ready for its first task."""
    classes = _written_classes(recipe.model)
    for task in tasks:
        recipe.check_time_steps(task.data.shape)
        if classes not in (None, task.data.classes):
            where = f" in {task.name}" if recipe.phases else ""
            raise ValueError(
                f"recipe: model and data must have the same classes; got {classes} and"
                f" {task.data.classes}{where}"
            )
    network = checked_network(recipe.model.build(), recipe.model)
    for task in reversed(tasks):
        task.choose_head(network)
    return network


def _written_classes(part: Spec) -> int | None:
    """What a model, or the model that it is built around, is told about classes."""
    inside = [_written_classes(value) for value in part.kwargs.values() if isinstance(value, Spec)]
    return part.kwargs.get("classes") or next(filter(None, inside), None)


def attached_rule(recipe: Recipe, network: nn.Module, world: World) -> Rule:
    """The recipe's rule on its network; refuses what does not fit together."""
    rule = checked_rule(recipe.rule.build(), recipe.rule)
    rule.check_steps(recipe.time_steps)
    rule.attach(network, world=world, over_time=recipe.over_time)
    rule.check_tasks(network, max(1, len(recipe.phases)))
    check_objective(recipe, rule)
    return rule


def check_objective(recipe: Recipe, rule: Rule) -> None:
    """Whether the objective fits the teacher, the rule, and how the rule asks for losses."""
    objective: Loss = recipe.objective.build()
    objective.check(
        taught=recipe.teacher is not None, over_time=recipe.over_time, time_steps=recipe.time_steps
    )
    if objective.remembers and not rule.one_loss_per_step:
        raise ValueError(
            f"{rule.label}: asks for more than one loss a step, so the objective must keep nothing"
            f" between them; got {recipe.objective.label}"
        )


def build_mixing(recipe: Recipe, split: Split) -> Mixing | None:
    if recipe.mixing is None:
        return None
    mixing = checked_mixing(recipe.mixing.build(), recipe.mixing)
    mixing.check(micro_batch=split.micro_batch)
    return mixing
