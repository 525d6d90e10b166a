"""Whether the parts of a recipe are what the pipeline takes: one line that names what is missing,
before anything trains.

T time, B batch, C channels, H W pixels, K classes
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pipeline.core.checks import are_counts, is_count
from pipeline.core.units import counted
from pipeline.data.base import Batch, Data, Loader
from pipeline.data.mixing import Mixing
from pipeline.models.teachers.base import Teacher
from pipeline.recipe.json import dotted, is_trusted
from pipeline.recipe.recipe import TRUSTED, Recipe, Spec
from pipeline.rules.base import Rule
from pipeline.spiking.encode import over_steps
from pipeline.spiking.state import fresh_state
from pipeline.train.objective import Loss

T_ = TypeVar("T_")

_DATA_METHODS: Mapping[str, tuple[str, ...]] = {
    "fingerprint": (),
    "check": (),
    "train": ("seed", "rank", "world", "batch_size", "micro_batch", "threads"),
    "val": ("rank", "world", "micro_batch", "threads"),
}
"""of pipeline.data.base.Data, and the keywords that each is called with"""

_fits: list[tuple[Spec, tuple[int, ...], int, int]] = []
"""networks that `check_network` found to fit, so that the runs of a suite need not try the same one
again
"""


def checked_data(data: Any, part: Spec) -> Data:
    """`data`, which `part` made, if it has what `pipeline.data.base.Data` asks for; no file is
    opened.

    Raises:
        ValueError: what is missing, or is not of its type.
    """
    who = f"data: {part.target.__name__}"
    _refuse_missing(who, data, ("classes", "shape", *_DATA_METHODS))
    if not is_count(data.classes):
        raise ValueError(
            f"{who}: classes must be a whole number of 1 or more; got {data.classes!r}"
        )
    if not are_counts(data.shape) or len(data.shape) not in (3, 4):
        raise ValueError(
            f"{who}: shape must be (C, H, W), or (T, C, H, W) of recordings; got {data.shape!r}"
        )
    for name, keywords in _DATA_METHODS.items():
        _refuse_signature(f"{who}.{name}", getattr(data, name), keywords)
    return data


def is_own(recipe: Recipe) -> bool:
    """Whether the data is of the user's own code: what the package brings is tried by its tests."""
    parts = (recipe.data, *(phase.data for phase in recipe.phases))
    return not all(is_trusted(dotted(part.target), TRUSTED) for part in parts)


def checked_loader(loader: Any, data: Data, method: str) -> Loader:
    """The loader that `data.train` or `data.val` returned, if it has what
    `pipeline.data.base.Loader` asks for.

    Raises:
        ValueError: what is missing.
    """
    _refuse_missing(
        f"data: what {type(data).__name__}.{method} returns",
        loader,
        ("samples", "steps_per_epoch", "epoch", "close"),
    )
    return loader


def fingerprint_of(data: Data) -> str:
    """Raises: ValueError where it is no text; what the data raises."""
    found = data.fingerprint()
    if not isinstance(found, str) or not found:
        raise ValueError(
            f"data: {type(data).__name__}.fingerprint must return a hash as text; got {found!r}"
        )
    return found


def check_first_batch(loader: Loader, data: Data, method: str) -> None:
    """Read a batch of what `data.train` or `data.val` returned.

    Raises:
        ValueError: sizes that are no numbers, no batch where there must be one, or what
        `check_batch` raises.
    """
    who = f"data: what {type(data).__name__}.{method} returns"
    if not is_count(loader.samples, least=0) or not is_count(loader.steps_per_epoch, least=0):
        got = f"{loader.samples!r} and {loader.steps_per_epoch!r}"
        raise ValueError(f"{who}: samples and steps_per_epoch must be whole numbers; got {got}")
    with loader.epoch(0) as batches:
        batch = next(iter(batches), None)
    if batch is not None:
        check_batch(batch, data, method)
    elif loader.steps_per_epoch:
        raise ValueError(
            f"{who}: an epoch must have {counted(loader.steps_per_epoch, 'batch')}; got none"
        )


def check_batch(batch: Any, data: Data, method: str) -> None:
    """Raises: ValueError for what is no batch of `data`: tensors of another type or shape, or
    labels of no class.
    """
    who = f"data: a batch of {type(data).__name__}.{method}"
    if not isinstance(batch, Batch):
        raise ValueError(f"{who}: must be a pipeline.data.base.Batch; got {type(batch).__name__}")
    expected = (
        ("x", torch.float32, f"[B, {', '.join(map(str, data.shape))}]", tuple(data.shape)),
        ("target", torch.int64, "[B]", ()),
        ("index", torch.int64, "[B]", ()),
    )
    samples = len(batch.x) if isinstance(batch.x, Tensor) and batch.x.dim() else 0
    if isinstance(batch.x, Tensor) and batch.x.numel() == 0:
        raise ValueError(f"{who}: must have samples; got x of shape {list(batch.x.shape)}")
    for name, dtype, told, shape in expected:
        value = getattr(batch, name)
        if (
            not isinstance(value, Tensor)
            or value.dtype != dtype
            or tuple(value.shape) != (samples, *shape)
        ):
            raise ValueError(
                f"{who}: {name} must be {str(dtype).removeprefix('torch.')} {told}; got"
                f" {_described(value)}"
            )
    low, high = int(batch.target.min()), int(batch.target.max())
    if low < 0 or high >= data.classes:
        raise ValueError(
            f"{who}: target must be in 0..{data.classes - 1}, of {counted(data.classes, 'class')};"
            f" got {low} to {high}"
        )


def checked_network(network: Any, part: Spec) -> nn.Module:
    """Raises: ValueError where `part` made no module."""
    return _made("model", part, network, nn.Module, "torch.nn.Module")


def check_network(network: nn.Module, recipe: Recipe, data: Data) -> None:
    """Try whether the network maps `[T,B,...]` to logits `[T,B,K]`: one forward pass on the CPU, of
    zeros in place of a sample.

    Raises:
        ValueError: what it gave, or how it failed.
    """
    key = (recipe.model, tuple(data.shape), recipe.time_steps, data.classes)
    if key in _fits:
        return
    samples = (
        2 if recipe.time_steps == 1 else 1
    )  # another number than T: axes in another order are found
    x_TB = over_steps(torch.zeros(samples, *data.shape), recipe.time_steps)
    wanted = (recipe.time_steps, samples, data.classes)
    rule = f"model: {recipe.model.target.__name__} must map [T, B, ...] to logits [T, B, K]"
    given = f"for an input of shape {list(x_TB.shape)} and {counted(data.classes, 'class')}"
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), fresh_state(network):
            logits = network(x_TB)
    except Exception as error:  # a network of the user's own may raise anything
        said = " ".join(str(error).split())
        raise ValueError(f"{rule}; {given} it raised {type(error).__name__}: {said}") from error
    finally:
        network.train(was_training)
    if (
        not isinstance(logits, Tensor)
        or tuple(logits.shape) != wanted
        or not logits.is_floating_point()
    ):
        raise ValueError(f"{rule}; {given} it gave {_described(logits)}")
    _fits.append(key)


def checked_rule(rule: Any, part: Spec) -> Rule:
    """Raises: ValueError where `part` made no rule, or one that lacks what a rule must say."""
    who = f"rule: {part.target.__name__}"
    rule = _made("rule", part, rule, Rule, "pipeline.rules.base.Rule")
    if type(rule)._loss_terms is Rule._loss_terms:
        raise ValueError(
            f"{who} must override _loss_terms, which yields the losses to differentiate; it"
            " does not"
        )
    if getattr(rule, "memory", None) not in ("constant", "linear"):
        raise ValueError(
            f"{who}: memory must be 'constant' or 'linear'; got {getattr(rule, 'memory', None)!r}"
        )
    return rule


def checked_objective(objective: Any, part: Spec, *, classes: int) -> Loss:
    """Raises: ValueError where `part` made no `pipeline.train.objective.Loss`, or its loss on
    labels is
    no scalar.
    """
    who = f"objective: {part.target.__name__}"
    _refuse_missing(who, objective, ("__call__", "labels", "remembers", "check"))
    loss = objective.labels(torch.zeros(2, dtype=torch.int64))(torch.zeros(2, classes))
    if not isinstance(loss, Tensor) or loss.dim():
        raise ValueError(
            f"{who} must map logits [B, K] to a scalar, the mean over the batch; got"
            f" {_described(loss)}"
        )
    return objective


def checked_teacher(teacher: Any, part: Spec) -> Teacher:
    """Raises: ValueError where `part` made no teacher, or one that lacks what a teacher must
    say.
    """
    who = f"teacher: {part.target.__name__}"
    teacher = _made("teacher", part, teacher, Teacher, "pipeline.models.teachers.base.Teacher")
    _refuse_missing(who, teacher, ("label",))
    for name in ("forward", "identity"):
        if getattr(type(teacher), name) is getattr(Teacher, name):
            raise ValueError(f"{who} must override {name}; it does not")
    return teacher


def checked_mixing(mixing: Any, part: Spec) -> Mixing:
    """Raises: ValueError where `part` made no mixing."""
    return _made("mixing", part, mixing, Mixing, "pipeline.data.mixing.Mixing")


def checked_schedule(schedule: Any, part: Spec) -> Callable[[int], None]:
    """Raises: ValueError where `part` made nothing that sets the learning rates of a step."""
    if not hasattr(schedule, "__call__"):  # noqa: B004  (callable() would narrow the type of what is returned)
        got = type(schedule).__name__
        raise ValueError(
            f"schedule: {part.target.__name__} must make a function of the step, as"
            f" pipeline.train.schedule does; got {got}"
        )
    return schedule


def checked_optimizer(optimizer: Any, part: Spec) -> torch.optim.Optimizer:
    """Raises: ValueError where `part` made no optimizer."""
    return _made("optimizer", part, optimizer, torch.optim.Optimizer, "torch.optim.Optimizer")


def _made(what: str, part: Spec, value: Any, kind: type[T_], name: str) -> T_:
    """`value`, which `part` made, if it is of this kind."""
    if not isinstance(value, kind):
        raise ValueError(
            f"{what}: {part.target.__name__} must make a {name}; got {type(value).__name__}"
        )
    return value


def _refuse_missing(who: str, value: object, names: Sequence[str]) -> None:
    missing = [name for name in names if not hasattr(value, name)]
    if missing:
        raise ValueError(f"{who} must have {', '.join(names)}; it has no {', no '.join(missing)}")


def _refuse_signature(who: str, method: Any, keywords: Sequence[str]) -> None:
    if not callable(method):
        raise ValueError(f"{who} must be a method; got {method!r}")
    try:
        inspect.signature(method).bind(**dict.fromkeys(keywords))
    except TypeError as error:
        raise ValueError(
            f"{who} is called with {', '.join(keywords) or 'no arguments'}; {error}"
        ) from error


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
