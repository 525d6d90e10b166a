"""Whether the parts of a recipe are what the pipeline takes. One line names what is missing, before
anything trains.

T time, B batch, C channels, H W pixels, K classes
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pipeline.core.checks import are_counts, is_count, require
from pipeline.core.units import counted
from pipeline.data.base import Batch, Data, Loader
from pipeline.recipe.json import dotted, is_trusted
from pipeline.recipe.recipe import TRUSTED, Recipe, Spec
from pipeline.rules.base import Rule
from pipeline.spiking.encode import over_steps
from pipeline.spiking.state import fresh_state

T_ = TypeVar("T_")

# of pipeline.data.base.Data, and the keywords that each is called with
_DATA_METHODS: Mapping[str, tuple[str, ...]] = {
    "fingerprint": (),
    "check": (),
    "train": ("seed", "rank", "world", "batch_size", "micro_batch", "threads"),
    "val": ("rank", "world", "micro_batch", "threads"),
}

# networks that `check_network` has accepted; the runs of a suite share them
_fits: list[tuple[Spec, tuple[int, ...], int, int]] = []


def build_part(what: str, part: Spec, kind: type[T_], *arguments: Any, name: str = "") -> T_:
    """What `part` makes. `name` is that of `kind` in the message.

    Raises:
        ValueError: it is not of this kind.
    """
    value = part.build(*arguments)
    require(
        isinstance(value, kind),
        f"{what}: {part.target.__name__} must make a {name or dotted(kind)}; got"
        f" {type(value).__name__}",
    )
    return value


def require_members(who: str, value: object, names: Sequence[str]) -> None:
    missing = [name for name in names if not hasattr(value, name)]
    require(
        not missing,
        f"{who} must have {', '.join(names)}; it has no {', no '.join(missing)}",
    )


# --------------------------------------------------------------------------------------------- data


def checked_data(data: Any, part: Spec) -> Data:
    """`data`, which `part` made. Opens no file.

    Raises:
        ValueError: it is not as `pipeline.data.base.Data` asks.
    """
    who = f"data: {part.target.__name__}"
    require_members(who, data, ("classes", "shape", *_DATA_METHODS))
    require(
        is_count(data.classes),
        f"{who}: classes must be a whole number of 1 or more; got {data.classes!r}",
    )
    require(
        are_counts(data.shape) and len(data.shape) in (3, 4),
        f"{who}: shape must be (C, H, W), or (T, C, H, W) of recordings; got {data.shape!r}",
    )
    for name, keywords in _DATA_METHODS.items():
        method = getattr(data, name)
        require(callable(method), f"{who}.{name} must be a method; got {method!r}")
        try:
            inspect.signature(method).bind(**dict.fromkeys(keywords))
        except TypeError as error:
            raise ValueError(
                f"{who}.{name} is called with {', '.join(keywords) or 'no arguments'}; {error}"
            ) from error
    return data


def is_own(recipe: Recipe) -> bool:
    """Whether the data is of the user's own code. Tests try what the package brings."""
    parts = (recipe.data, *(phase.data for phase in recipe.phases))
    return not all(is_trusted(dotted(part.target), TRUSTED) for part in parts)


def checked_loader(loader: Any, data: Data, method: str) -> Loader:
    """The loader that `data.train` or `data.val` returned.

    Raises:
        ValueError: it is not as `pipeline.data.base.Loader` asks.
    """
    who = f"data: what {type(data).__name__}.{method} returns"
    require_members(who, loader, ("samples", "steps_per_epoch", "epoch", "close"))
    return loader


def fingerprint_of(data: Data) -> str:
    """Raises: ValueError if it is no text; what the data raises."""
    found = data.fingerprint()
    require(
        isinstance(found, str) and bool(found),
        f"data: {type(data).__name__}.fingerprint must return a hash as text; got {found!r}",
    )
    return found


def check_first_batch(loader: Loader, data: Data, method: str) -> None:
    """Read a batch of what `data.train` or `data.val` returned.

    Raises:
        ValueError: sizes that are no numbers, no batch though there must be one, or what
            `check_batch` raises.
    """
    who = f"data: what {type(data).__name__}.{method} returns"
    require(
        is_count(loader.samples, least=0) and is_count(loader.steps_per_epoch, least=0),
        f"{who}: samples and steps_per_epoch must be whole numbers; got {loader.samples!r} and"
        f" {loader.steps_per_epoch!r}",
    )
    with loader.epoch(0) as batches:
        batch = next(iter(batches), None)
    if batch is not None:
        check_batch(batch, data, method)
    elif loader.steps_per_epoch:
        raise ValueError(
            f"{who}: an epoch must have {counted(loader.steps_per_epoch, 'batch')}; got none"
        )


def check_batch(batch: Any, data: Data, method: str) -> None:
    """Raises: ValueError if it is no batch of `data`: tensors of another type or shape, or labels
    of no class.
    """
    who = f"data: a batch of {type(data).__name__}.{method}"
    require(
        isinstance(batch, Batch),
        f"{who}: must be a pipeline.data.base.Batch; got {type(batch).__name__}",
    )
    samples = len(batch.x) if isinstance(batch.x, Tensor) and batch.x.dim() else 0
    require(
        not isinstance(batch.x, Tensor) or batch.x.numel() > 0,
        f"{who}: must have samples; got x of shape {list(getattr(batch.x, 'shape', ()))}",
    )
    for name, dtype, shape in (
        ("x", torch.float32, tuple(data.shape)),
        ("target", torch.int64, ()),
        ("index", torch.int64, ()),
    ):
        value = getattr(batch, name)
        wanted = f"{str(dtype).removeprefix('torch.')} [{', '.join(map(str, ('B', *shape)))}]"
        require(
            isinstance(value, Tensor) and value.dtype == dtype and value.shape == (samples, *shape),
            f"{who}: {name} must be {wanted}; got {_describe(value)}",
        )
    low, high = int(batch.target.min()), int(batch.target.max())
    require(
        0 <= low <= high < data.classes,
        f"{who}: target must be in 0..{data.classes - 1}, of {counted(data.classes, 'class')};"
        f" got {low} to {high}",
    )


# ---------------------------------------------------------------------------------- the other parts


def check_network(network: nn.Module, recipe: Recipe, data: Data) -> None:
    """Run one forward pass on the CPU, of zeros in place of samples.

    Raises:
        ValueError: it failed, or did not map `[T,B,...]` to logits `[T,B,K]`.
    """
    key = (recipe.model, tuple(data.shape), recipe.time_steps, data.classes)
    if key in _fits:
        return
    samples = 2 if recipe.time_steps == 1 else 1  # not T: swapped axes are found
    x_TB = over_steps(torch.zeros(samples, *data.shape), recipe.time_steps)
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
    require(
        isinstance(logits, Tensor)
        and logits.shape == (recipe.time_steps, samples, data.classes)
        and logits.is_floating_point(),
        f"{rule}; {given} it gave {_describe(logits)}",
    )
    _fits.append(key)


def check_rule(rule: Rule, part: Spec) -> None:
    """Raises: ValueError if the rule lacks what every rule must define."""
    who, memory = f"rule: {part.target.__name__}", getattr(rule, "memory", None)
    require(
        type(rule)._loss_terms is not Rule._loss_terms,
        f"{who} must override _loss_terms, which yields the losses to differentiate; it does not",
    )
    require(
        memory in ("constant", "linear"),
        f"{who}: memory must be 'constant' or 'linear'; got {memory!r}",
    )


def check_objective(objective: Any, part: Spec, *, classes: int) -> None:
    """Raises: ValueError if it is not as `pipeline.train.objective.Loss` asks, or its loss on
    labels is no scalar.
    """
    who = f"objective: {part.target.__name__}"
    require_members(who, objective, ("__call__", "labels", "remembers", "check"))
    loss = objective.labels(torch.zeros(2, dtype=torch.int64))(torch.zeros(2, classes))
    require(
        isinstance(loss, Tensor) and not loss.dim(),
        f"{who} must map logits [B, K] to a scalar, the mean over the batch; got {_describe(loss)}",
    )


def check_schedule(schedule: Callable[[int], None], part: Spec) -> None:
    """Raises: ValueError if it is no function."""
    require(
        callable(schedule),
        f"schedule: {part.target.__name__} must make a function of the step, as"
        f" pipeline.train.schedule does; got {type(schedule).__name__}",
    )


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
