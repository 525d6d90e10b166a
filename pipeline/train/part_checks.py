"""Checks, before training, that the parts of a recipe have the interfaces that the pipeline needs.
An error message has one line and names the member at fault.

T time, B batch, C channels, H W pixels, K classes
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pipeline.core.checks import are_counts, is_count, refuse_unless_counts, require
from pipeline.core.units import counted
from pipeline.data.base import Batch, Data, Loader
from pipeline.recipe.json import dotted
from pipeline.recipe.recipe import Recipe, Spec
from pipeline.spiking.encode import to_time_first
from pipeline.spiking.state import fresh_state

T_ = TypeVar("T_")

# the methods of pipeline.data.base.Data, and the keyword arguments of their calls
_DATA_METHODS: Mapping[str, tuple[str, ...]] = {
    "fingerprint": (),
    "check": (),
    "train": ("seed", "rank", "world", "batch_size", "micro_batch", "threads"),
    "val": ("rank", "world", "micro_batch", "threads"),
}


def build_part(subject: str, part: Spec, kind: type[T_], *arguments: Any, name: str = "") -> T_:
    """Build `part`, which must be a `kind`. `name` is the name of `kind` in the message.

    Raises:
        ValueError: the object is not of this kind.
    """
    value = part.build(*arguments)
    require(
        isinstance(value, kind),
        f"{subject}: {part.target.__name__} must return a {name or dotted(kind)}; got"
        f" {type(value).__name__}",
    )
    return value


def require_members(subject: str, value: object, names: Sequence[str]) -> None:
    missing = [name for name in names if not hasattr(value, name)]
    require(
        not missing,
        f"{subject} must have {', '.join(names)}; it has no {', no '.join(missing)}",
    )


# --------------------------------------------------------------------------------------------- data


def check_data_members(data: Any, part: Spec) -> Data:
    """Check `data`, which `part` built, and return it. Opens no file.

    Raises:
        ValueError: `data` does not implement `pipeline.data.base.Data`.
    """
    subject = f"data: {part.target.__name__}"
    require_members(subject, data, ("classes", "shape", *_DATA_METHODS))
    require(
        is_count(data.classes),
        f"{subject}: classes must be a whole number of 1 or more; got {data.classes!r}",
    )
    require(
        are_counts(data.shape) and len(data.shape) in (3, 4),
        f"{subject}: shape must be (C, H, W), or (T, C, H, W) for recordings; got {data.shape!r}",
    )
    for name, keywords in _DATA_METHODS.items():
        try:
            inspect.signature(getattr(data, name)).bind(**dict.fromkeys(keywords))
        except TypeError as error:
            raise ValueError(
                f"{subject}.{name} must accept a call with"
                f" {', '.join(keywords) or 'no arguments'}; {error}"
            ) from error
    return data


def check_loader(loader: Loader, data: Data, method: str) -> Loader:
    """Check a loader that `data.train` or `data.val` returned, and return it. Reads no sample.

    Raises: ValueError if the loader does not implement `pipeline.data.base.Loader`.
    """
    subject = f"data: the loader of {type(data).__name__}.{method}"
    require_members(subject, loader, ("samples", "steps_per_epoch", "epoch", "close"))
    refuse_unless_counts(
        subject,
        {"samples": loader.samples, "steps_per_epoch": loader.steps_per_epoch},
        minimum=0,
    )
    return loader


def check_first_batch(loader: Loader, data: Data, method: str) -> Batch | None:
    """Check the first batch of a loader, and return it. None if `steps_per_epoch` is 0.

    Raises: ValueError if the batch is missing or empty, is not a `Batch`, has tensors of another
    type or shape, or has a label that is not a class.
    """
    with loader.epoch(0) as batches:
        batch: Any = next(iter(batches), None)
    subject = f"data: a batch of {type(data).__name__}.{method}"
    if batch is None:
        require(
            not loader.steps_per_epoch,
            f"data: an epoch of {type(data).__name__}.{method} must have"
            f" {counted(loader.steps_per_epoch, 'batch')}; got none",
        )
        return None
    require(
        isinstance(batch, Batch),
        f"{subject} must be a pipeline.data.base.Batch; got {type(batch).__name__}",
    )
    samples = len(batch.target) if isinstance(batch.target, Tensor) and batch.target.dim() else 0
    x_dtype = torch.float32 if batch.table is None else torch.uint8
    for name, dtype, shape in (
        ("target", torch.int64, ()),
        ("x", x_dtype, tuple(data.shape)),
        ("index", torch.int64, ()),
    ):
        value = getattr(batch, name)
        require(
            isinstance(value, Tensor) and value.dtype == dtype and value.shape == (samples, *shape),
            f"{subject}: {name} must be {str(dtype).removeprefix('torch.')}"
            f" [{', '.join(map(str, ('B', *shape)))}]; got {_describe(value)}",
        )
    require(samples > 0, f"{subject} must have samples; got none")
    low, high = int(batch.target.min()), int(batch.target.max())
    require(
        0 <= low <= high < data.classes,
        f"{subject}: target must be in 0..{data.classes - 1}, of {counted(data.classes, 'class')};"
        f" got {low} to {high}",
    )
    return batch


# ---------------------------------------------------------------------------------- the other parts


def check_network(network: nn.Module, recipe: Recipe, data: Data) -> None:
    """Check the network by one forward pass on the CPU, with samples of zeros.

    Raises:
        ValueError: the pass failed, or the result is not logits `[T,B,K]` of floats.
    """
    samples = 2 if recipe.time_steps == 1 else 1  # B is not T, so that swapped axes are found
    x_TB = to_time_first(torch.zeros(samples, *data.shape), recipe.time_steps)
    rule = f"model: {recipe.model.target.__name__} must map [T, B, ...] to logits [T, B, K]"
    case = f"for an input of shape {list(x_TB.shape)} and {counted(data.classes, 'class')}"
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), fresh_state(network):
            logits = network(x_TB)
    except Exception as error:  # a network of the user's own may raise anything
        raise ValueError(
            f"{rule}; {case} it raised {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    finally:
        network.train(was_training)
    require(
        isinstance(logits, Tensor)
        and logits.shape == (recipe.time_steps, samples, data.classes)
        and logits.is_floating_point(),
        f"{rule}; {case} it returned {_describe(logits)}",
    )


def check_objective(objective: Any, part: Spec, *, classes: int) -> None:
    """Raises: ValueError if `objective` does not implement `pipeline.train.objective.Loss`, or its
    loss on labels is not a scalar.
    """
    subject = f"objective: {part.target.__name__}"
    require_members(subject, objective, ("__call__", "labels", "is_stateful", "check"))
    loss = objective.labels(torch.zeros(2, dtype=torch.int64))(torch.zeros(2, classes))
    require(
        isinstance(loss, Tensor) and not loss.dim(),
        f"{subject} must map logits [B, K] to a scalar, the mean over the batch; got"
        f" {_describe(loss)}",
    )


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
