"""The optimizer of a recipe, what its weight decay spares, and its schedule of learning rates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from pipeline.recipe.phases import Stretch, stretch_at
from pipeline.recipe.recipe import Recipe
from pipeline.rules.base import Rule
from pipeline.spiking.binary import latent_parameters
from pipeline.train.part_checks import checked_optimizer


def build_optimizer(recipe: Recipe, network: nn.Module, rule: Rule) -> torch.optim.Optimizer:
    try:
        optimizer = recipe.optimizer.build(network)
    except (
        TypeError,
        AssertionError,
        RuntimeError,
    ) as error:  # timm passes on what it does not know, and complains in many ways
        raise ValueError(f"{recipe.optimizer.label}: {error}") from error
    checked_optimizer(optimizer, recipe.optimizer)
    spare_from_decay(optimizer, latent_parameters(network))
    rule.check_optimizer(optimizer)
    decay = max(group.get("weight_decay", 0.0) for group in optimizer.param_groups)
    if decay and any(phase.head is not None for phase in recipe.phases):
        raise ValueError(
            "recipe: weight_decay must be 0 where phases have heads, for it shrinks the others"
            f" too; got {decay}"
        )
    return optimizer


def spare_from_decay(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Take `parameters` out of weight decay, whatever built the optimizer and its groups: they get
    groups of their own.

    timm reads names from a network's `no_weight_decay` instead, of the outermost network alone, and
    only where it makes the groups itself (1.0.31).
    """
    spared = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        is_spared = [id(parameter) in spared for parameter in group["params"]]
        if not group.get("weight_decay") or not any(is_spared):
            continue
        if all(is_spared):
            group["weight_decay"] = 0.0
            continue
        columns = {name: list(group[name]) for name in ("params", "param_names") if name in group}
        inside = {
            name: list(itertools.compress(column, is_spared)) for name, column in columns.items()
        }
        group.update(
            {
                name: [x for x, out in zip(column, is_spared, strict=True) if not out]
                for name, column in columns.items()
            }
        )
        optimizer.add_param_group({**group, **inside, "weight_decay": 0.0})


def build_schedule(
    recipe: Recipe, optimizer: torch.optim.Optimizer, stretches: Sequence[Stretch]
) -> Callable[[int], None]:
    """The recipe's schedule of learning rates, begun anew in each phase."""
    rates = [group["lr"] for group in optimizer.param_groups]
    schedules = []
    for stretch in stretches:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # a schedule with a warm-up sets it as soon as it is made
        schedules.append(recipe.schedule.build(optimizer, stretch.steps, stretch.epoch_steps))

    def schedule(step: int) -> None:
        stretch = stretch_at(stretches, step)
        schedules[stretch.index](step - stretch.first)

    return schedule
