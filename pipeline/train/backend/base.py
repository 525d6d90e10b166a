"""A backend holds the model and its optimizer, differentiates shares of a batch, and steps.

Every backward call of the product goes through `Backend.backward`. So the conventions for several
backward calls per optimizer step are in one place. A violation of them raises no error.

Backends share the functions at the end: they reset an optimizer, and copy a state that changes, on
the CPU for a checkpoint or on its device for a batch that may be undone.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

T_ = TypeVar("T_")
OptimizerOf = Callable[[nn.Module], torch.optim.Optimizer]


class Backend(Protocol):
    """One process's view of a model that all ranks train together."""

    name: str  # also the name of its folder in a checkpoint
    # the bare network inside: its `state_dict` is evaluated and published
    network: nn.Module
    # called in training: maps [T,B,...] to [T,B,K] in the recipe's precision
    model: nn.Module
    optimizer: torch.optim.Optimizer  # a schedule sets its learning rates

    def backward(self, loss: Tensor, share: float) -> None:
        """Add the gradient of `share * loss`. Shares sum to 1 over the ranks and micro-batches of a
        global batch.
        """

    def gradients(self) -> list[Tensor]:
        """The gradients on this rank before `step`, of the parameters that have any.

        If ZeRO divides the gradients among ranks, each rank has some of their sums.
        """
        ...

    def discard(self) -> None:
        """Forget the gradients. The weights stay. Impossible if ZeRO holds gradients of its own."""

    def step(self) -> None:
        """Sum the gradients over ranks, clip them if the recipe asks for it, move the weights, and
        forget the gradients.
        """

    def forget(self) -> None:
        """Reset the optimizer's state, including momentum, and its settings. The weights stay."""

    def published(self) -> AbstractContextManager[None]:
        """Inside, `network` holds the values that are evaluated and published: its weights, or an
        average of them. `step` must not be called inside.
        """
        return nullcontext()

    def replicated(self) -> list[Tensor]:
        """The values that are the same on every rank, bit for bit: the weights, and an average of
        them if there is one.
        """
        return list(self.network.parameters())

    def capture(self) -> dict[str, Any]:
        """A copy on the CPU of weights and optimizer state. It maps names of files, which may
        contain folders, to the values that this rank writes with `torch.save`. Collective.
        """
        ...

    def load(self, folder: Path) -> None:
        """Read the files of every rank's `capture`. Collective."""


def forgetter(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A function that resets `optimizer` to its current state. It must not have stepped yet.

    DeepSpeed's ZeRO wrappers (0.19.8) contain a torch optimizer for this rank's share of the
    parameters. timm's Lookahead (1.0.31) contains the optimizer that keeps the state.
    """
    for inside in ("optimizer", "_base_optimizer"):
        optimizer = getattr(optimizer, inside, optimizer)
    # Adagrad has a state before its first step.
    states = {parameter: copy.deepcopy(state) for parameter, state in optimizer.state.items()}
    initial_settings = [
        copy.deepcopy({name: value for name, value in group.items() if name != "params"})
        for group in optimizer.param_groups
    ]

    def forget() -> None:
        optimizer.state.clear()
        for parameter, state in states.items():
            optimizer.state[parameter] = copy.deepcopy(state)
        for group, settings in zip(optimizer.param_groups, initial_settings, strict=True):
            for name in group.keys() - settings.keys() - {"params"}:  # LAMB counts its steps here
                del group[name]
            group.update(copy.deepcopy(settings))

    return forget


def copied(value: Any, seen: dict[int, Tensor] | None = None) -> Any:
    """A deep copy of `value` on the CPU. A tensor that occurs twice is copied once.

    `seen` has the copies so far by the ids of their originals, which live as long as `value`.
    """
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = value.detach().to("cpu", copy=True)
        return seen[id(value)]
    if isinstance(value, MutableMapping):
        copied_mapping = copy.copy(value)  # keeps attributes, such as the versions of a state_dict
        for key, inside in value.items():
            copied_mapping[key] = copied(inside, seen)
        return copied_mapping
    if type(value) in (list, tuple):
        return type(value)(copied(inside, seen) for inside in value)
    return copy.deepcopy(value)


def cloned(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor copied on its own device. One kernel copies all tensors of a dtype."""
    clones = {name: torch.empty_like(value) for name, value in values.items()}
    for names in alike(values):
        torch._foreach_copy_(
            [clones[name] for name in names], [values[name].detach() for name in names]
        )
    return clones


@contextmanager
def replaced(
    tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Inside, each tensor holds the value of its name. Yields copies of the tensors' own values,
    which the tensors hold again afterwards.
    """
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    try:
        for name, tensor in tensors.items():
            tensor.copy_(values[name])
        yield own
    finally:
        for name, tensor in tensors.items():
            tensor.copy_(own[name])


def alike(values: Mapping[T_, Tensor]) -> Iterable[list[T_]]:
    """The keys of `values`, in one list for each dtype and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[T_]] = {}
    for key, value in values.items():
        groups.setdefault((value.dtype, value.device), []).append(key)
    return groups.values()
