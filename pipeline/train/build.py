"""Builds and checks the parts of a recipe in one process: network, rule, optimizer and schedule.

No function here reads a data file or communicates with another process.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.core.checks import require
from pipeline.core.units import counted
from pipeline.recipe.phases import Stretch, stretch_at
from pipeline.recipe.recipe import Recipe, Spec
from pipeline.recipe.suite import Suite, fill_references, references
from pipeline.rules.base import Rule, World
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.binary import latent_parameters
from pipeline.spiking.synapse import pack_spikes
from pipeline.train.checkpoint import weights_of
from pipeline.train.elastic import fit_to_sizes
from pipeline.train.objective import Loss
from pipeline.train.part_checks import (
    build_part,
    check_network,
    check_objective,
)
from pipeline.train.tasks import Task, tasks_of
from pipeline.train.teaching import build_teacher
from pipeline.train.weights import load_start, weights_file


def check_recipe(recipe: Recipe, *sizes: int) -> nn.Module:
    """Check that the parts of a recipe fit together. Returns its network. Needs no data file.

    `sizes`: the numbers of workers that the run may have.

    Raises:
        ValueError: a part cannot be built, or does not fit.
    """
    tasks = tasks_of(recipe)
    network = build_network(recipe, tasks)
    if recipe.init is not None:
        load_start(network, weights_file(Path(recipe.init)))
    check_network(network, recipe, tasks[0].data)
    check_objective(recipe.objective.build(), recipe.objective, classes=tasks[0].data.classes)
    rule = attach_rule(recipe, network, World(recipe.seed, size=sizes[-1]))
    fit_to_sizes(recipe, network, rule, sizes)
    if recipe.teacher is not None:
        build_teacher(recipe, tasks[0].data)
    if recipe.evaluation.fidelity_every:
        require(
            not recipe.phases,
            "recipe: evaluation.fidelity_every needs a recipe without phases; got"
            f" {counted(len(recipe.phases), 'phase')}",
        )
        try:
            for reference in (BPTT(), SLTT()):
                reference.attach(build_network(recipe, tasks), over_time=recipe.over_time)
        except ValueError as error:
            raise ValueError(
                f"recipe: evaluation.fidelity_every compares with BPTT and SLTT; {error}"
            ) from None
    schedule = recipe.schedule.build(build_optimizer(recipe, network, rule), 1000, 100)
    require(
        callable(schedule),
        f"schedule: {recipe.schedule.target.__name__} must return a function of the step, as"
        f" pipeline.train.schedule does; got {type(schedule).__name__}",
    )
    return network


def build_network(recipe: Recipe, tasks: Sequence[Task]) -> nn.Module:
    """The recipe's network with initial weights and the head of its first task.

    Raises:
        ValueError: the network cannot be built, or does not fit the data of a task.
    """
    classes = _classes_in(recipe.model)
    for task in tasks:
        recipe.check_time_steps(task.data.shape)
        require(
            classes in (None, task.data.classes),
            "recipe: model and data must have the same number of classes; got"
            f" {classes} and {task.data.classes} ({task.name})",
        )
    network = build_part("model", recipe.model, nn.Module, name="torch.nn.Module")
    for task in reversed(tasks):  # checks every head, and leaves the first one chosen
        task.choose_head(network)
    if recipe.pack_spikes:
        pack_spikes(network)
    return network


def _classes_in(part: Spec) -> int | None:
    """The argument `classes` of a part, or else of a part inside it."""
    inside = [_classes_in(value) for value in part.kwargs.values() if isinstance(value, Spec)]
    return part.kwargs.get("classes") or next(filter(None, inside), None)


def attach_rule(recipe: Recipe, network: nn.Module, world: World) -> Rule:
    """Attach the recipe's rule to its network. Returns the rule.

    Raises:
        ValueError: rule, network, tasks, objective and teacher do not fit together.
    """
    rule = build_part("rule", recipe.rule, Rule)
    subject, memory = f"rule: {recipe.rule.target.__name__}", getattr(rule, "memory", None)
    require(
        type(rule)._loss_terms is not Rule._loss_terms,
        f"{subject} must override _loss_terms, which yields the losses to differentiate; it does"
        " not",
    )
    require(
        memory in ("constant", "linear"),
        f"{subject}: memory must be 'constant' or 'linear'; got {memory!r}",
    )
    rule.check_steps(recipe.time_steps)
    rule.attach(network, world=world, over_time=recipe.over_time)
    rule.check_tasks(network, max(1, len(recipe.phases)))
    objective: Loss = recipe.objective.build()
    objective.check(
        has_teacher=recipe.teacher is not None,
        over_time=recipe.over_time,
        time_steps=recipe.time_steps,
    )
    require(
        rule.one_loss_per_step or not objective.is_stateful,
        f"{rule.label}: needs several losses per step, so the loss must not depend on earlier ones;"
        f" got {recipe.objective.label}",
    )
    return rule


@contextmanager
def with_placeholder_weights(suite: Suite) -> Iterator[tuple[Recipe, ...]]:
    """The recipes of a suite, with a temporary file of initial weights in place of each reference
    to the weights of another run. The files exist inside the `with` block.

    The tensors in a file have the names and shapes of the trained weights. So all checks that do
    not depend on values are possible before the first run.

    Raises:
        ValueError: a network whose weights are needed cannot be built.
    """
    referenced = {name for recipe in suite.recipes for name in references(recipe)}
    files: dict[str, Path] = {}
    recipes: list[Recipe] = []
    with tempfile.TemporaryDirectory(prefix="spiketrain-") as folder:
        for recipe in suite.recipes:
            recipes.append(fill_references(recipe, files.__getitem__))
            if recipe.name in referenced:
                files[recipe.name] = Path(folder) / f"{len(recipes)}.safetensors"
                network = build_network(recipes[-1], tasks_of(recipes[-1]))
                save_file(weights_of(network), files[recipe.name])
        yield tuple(recipes)


def build_optimizer(recipe: Recipe, network: nn.Module, rule: Rule) -> torch.optim.Optimizer:
    # timm asks the network for the layer of each parameter, for `layer_decay`.
    has_own_layers = hasattr(network, "group_matcher")
    if not has_own_layers:
        layers = _layer_numbers(network)
        vars(network)["group_matcher"] = lambda coarse: layers.__getitem__
    try:
        optimizer = build_part(
            "optimizer",
            recipe.optimizer,
            torch.optim.Optimizer,
            network,
            name="torch.optim.Optimizer",
        )
    except (TypeError, AssertionError, RuntimeError) as error:  # timm's errors for a wrong argument
        raise ValueError(f"{recipe.optimizer.label}: {error}") from error
    finally:
        if not has_own_layers:
            del vars(network)["group_matcher"]
    exclude_from_decay(optimizer, latent_parameters(network))
    rule.check_optimizer(optimizer)
    decay = max(group.get("weight_decay", 0.0) for group in optimizer.param_groups)
    require(
        not decay or all(phase.head is None for phase in recipe.phases),
        "recipe: weight_decay must be 0 if phases have heads, because it also shrinks the heads of"
        f" other phases; got {decay}",
    )
    return optimizer


def _layer_numbers(network: nn.Module) -> dict[str, int]:
    """The number of the layer of each parameter. A layer begins at each matrix of weights, and its
    norms and neurons belong to it.
    """
    numbers, layer = {}, 0
    for module_name, module in network.named_modules():
        own = dict(module.named_parameters(prefix=module_name, recurse=False))
        layer += any(parameter.dim() > 1 for parameter in own.values())
        numbers |= dict.fromkeys(own, layer)
    return numbers


def exclude_from_decay(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Exclude `parameters` from weight decay.

    `parameters` move to a new group if their group also has others.

    By name, timm (1.0.31) excludes only parameters that the outermost network lists in
    `no_weight_decay`, and only in groups that timm itself makes.
    """
    excluded = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        is_excluded = [id(parameter) in excluded for parameter in group["params"]]
        if not group.get("weight_decay") or not any(is_excluded):
            continue
        if all(is_excluded):
            group["weight_decay"] = 0.0
            continue
        is_kept = [not each for each in is_excluded]
        new_group = {**group, "weight_decay": 0.0}
        for name in {"params", "param_names"} & group.keys():
            new_group[name] = list(itertools.compress(group[name], is_excluded))
            group[name] = list(itertools.compress(group[name], is_kept))
        optimizer.add_param_group(new_group)


def build_schedule(
    recipe: Recipe, optimizer: torch.optim.Optimizer, stretches: Sequence[Stretch]
) -> Callable[[int], None]:
    """The recipe's schedule of the learning rate. It begins again with each phase."""
    rates = [group["lr"] for group in optimizer.param_groups]
    schedules = []
    for stretch in stretches:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # building the previous schedule may have set its first rate
        schedules.append(recipe.schedule.build(optimizer, stretch.steps, stretch.epoch_steps))

    def schedule(step: int) -> None:
        stretch = stretch_at(stretches, step)
        schedules[stretch.index](step - stretch.first)

    return schedule
