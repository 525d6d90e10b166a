"""A backend holds the model and its optimizer, differentiates loss terms, and moves the weights.

Training calls `backward` only in `Backend.backward`. So the conventions for several backward calls
per optimizer step are in one place. A violation of these conventions raises no error.

The functions at the end are for all backends. They reset an optimizer, copy a state to the CPU for
a checkpoint, copy tensors on their device, and set values for a while.
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
    """The model and the optimizer on one rank. All ranks train the model together."""

    name: str  # also the name of the backend's folder in a checkpoint
    # the network without wrappers; its `state_dict` is evaluated and published
    network: nn.Module
    # the network that training calls: it maps [T,B,...] to [T,B,K] in the recipe's precision
    model: nn.Module
    optimizer: torch.optim.Optimizer  # a schedule sets its learning rates
    # whether `step` accepts a flag on the device
    skips_on_device: bool

    def backward(self, loss: Tensor, share: float) -> None:
        """Add the gradient of `share * loss`. The shares of all ranks and micro-batches of a global
        batch sum to 1.
        """

    def gradients(self) -> list[Tensor]:
        """The gradients on this rank before `step`. A parameter without a gradient has no entry.

        At ZeRO-2 each rank has only its part of the gradients, already summed over ranks.
        """
        ...

    def zero_grad(self) -> None:
        """Delete the gradients.

        Raises:
            ValueError: at ZeRO-1 and ZeRO-2, which hold gradients of their own.
        """

    def step(self, bad: Tensor | bool = False) -> None:
        """Sum the gradients over ranks, clip them if the recipe has a `clip_norm`, move the
        weights, and delete the gradients.

        `bad`: whether weights and optimizer state must keep their values. If `skips_on_device`, it
        may be a tensor `[]` on the device, 1.0 or 0.0, which the host does not read.
        """

    def reset_optimizer(self) -> None:
        """Reset the optimizer's state, including momentum, and its settings. The weights stay."""

    def published(self) -> AbstractContextManager[None]:
        """Inside the context, `network` holds the values that are evaluated and published: its
        weights, or their average. `step` must not be called inside.
        """
        return nullcontext()

    def replicated(self) -> list[Tensor]:
        """The values that are the same on every rank, bit for bit: the weights, and their average
        if there is one.
        """
        return list(self.network.parameters())

    def capture(self) -> dict[str, Any]:
        """A copy on the CPU of weights and optimizer state: the values that this rank writes with
        `torch.save`, by path inside the backend's folder. Collective.
        """
        ...

    def load(self, folder: Path) -> None:
        """Restore the state from a folder with the files of every rank's `capture`. Collective."""


def optimizer_reset(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A function that resets `optimizer` to the state at this call. This call must come before the
    optimizer's first step.

    DeepSpeed's ZeRO wrappers (0.19.8) contain a torch optimizer for this rank's part of the
    parameters. timm's Lookahead (1.0.31) contains the optimizer that has the state.
    """
    for attribute in ("optimizer", "_base_optimizer"):
        optimizer = getattr(optimizer, attribute, optimizer)
    # Adagrad has a state before its first step.
    initial_states = {
        parameter: copy.deepcopy(state) for parameter, state in optimizer.state.items()
    }
    initial_settings = [
        copy.deepcopy({name: value for name, value in group.items() if name != "params"})
        for group in optimizer.param_groups
    ]

    def reset() -> None:
        optimizer.state.clear()
        for parameter, state in initial_states.items():
            optimizer.state[parameter] = copy.deepcopy(state)
        for group, settings in zip(optimizer.param_groups, initial_settings, strict=True):
            for name in group.keys() - settings.keys() - {"params"}:  # LAMB counts its steps here
                del group[name]
            group.update(copy.deepcopy(settings))

    return reset


_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
_HOW = ("fused", "foreach")  # settings of how a step is computed, not of what


def fuse(optimizer: torch.optim.Optimizer) -> bool:
    """Let one kernel move all weights on a GPU, if torch has this kernel for the optimizer. The
    kernel can skip a step by a flag on the device.

    A checkpoint may come from another kind of device, so loading one keeps how steps are computed.
    Returns whether `Backend.step` accepts a flag on the device.
    """
    dampens = any(group.get("dampening") for group in optimizer.param_groups)
    if type(optimizer) not in _FUSED or dampens:  # a first step is not dampened
        return False
    groups = optimizer.param_groups
    if all(parameter.is_cuda for group in groups for parameter in group["params"]):
        for group in groups:
            group.update(fused=True, foreach=False)

    def keep_how(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(state["param_groups"], optimizer.param_groups, strict=True)
        kept = [{**saved, **{name: own[name] for name in _HOW}} for saved, own in pairs]
        return {**state, "param_groups": kept}

    optimizer.register_load_state_dict_pre_hook(keep_how)
    if not all(group["fused"] for group in groups):
        return False
    optimizer.register_load_state_dict_post_hook(_in_order_of_weights)
    if type(optimizer) is torch.optim.SGD:
        optimizer.register_step_pre_hook(_make_momenta)
    return True


def _in_order_of_weights(optimizer: torch.optim.Optimizer) -> None:
    """Give the state the weights' order of memory, which the kernel requires."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            is_like = isinstance(value, Tensor) and value.shape == parameter.shape
            if is_like and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _make_momenta(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Make missing momenta. The kernel makes them only if all are missing (torch 2.13), and leaves
    them empty if it skips the step. A momentum of 0 gives the first step without one.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            if parameter.grad is not None and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


@contextmanager
def skipping(optimizer: torch.optim.Optimizer, bad: Tensor | bool) -> Iterator[None]:
    """Inside the context, a step of an optimizer that `fuse` accepts keeps all values if the flag
    `bad` on the device is 1. torch's gradient scaler uses the same attribute.
    """
    if isinstance(bad, Tensor):
        optimizer.found_inf = bad  # type: ignore[attr-defined]
    try:
        yield
    finally:
        vars(optimizer).pop("found_inf", None)


def restore_where(bad: Tensor, tensors: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    """Give each tensor its value in `kept` if the flag `bad` on the device is 1."""
    for names in group_by_dtype_and_device(tensors):
        group = [tensors[name].detach() for name in names]
        old = torch.cat([kept[name].flatten() for name in names])
        new = torch.cat([tensor.flatten() for tensor in group])
        chosen = torch.where(bad > 0, old, new).split([tensor.numel() for tensor in group])
        torch._foreach_copy_(
            group, [value.view_as(tensor) for value, tensor in zip(chosen, group, strict=True)]
        )


def cpu_copy(value: Any, copies: dict[int, Tensor] | None = None) -> Any:
    """A deep copy of `value` on the CPU. A tensor that occurs twice is copied once.

    `copies` holds the copies made so far, by the id of the original. `value` keeps each original
    alive, so no other object has its id.
    """
    copies = {} if copies is None else copies
    if isinstance(value, Tensor):
        if id(value) not in copies:
            copies[id(value)] = value.detach().to("cpu", copy=True)
        return copies[id(value)]
    if isinstance(value, MutableMapping):
        mapping = copy.copy(value)  # keeps attributes, such as the versions of a state_dict
        for key, item in value.items():
            mapping[key] = cpu_copy(item, copies)
        return mapping
    if type(value) in (list, tuple):
        return type(value)(cpu_copy(item, copies) for item in value)
    return copy.deepcopy(value)


def clone_tensors(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of each tensor on its own device. One kernel copies all tensors of a dtype."""
    clones = {name: torch.empty_like(value) for name, value in values.items()}
    for names in group_by_dtype_and_device(values):
        torch._foreach_copy_(
            [clones[name] for name in names], [values[name].detach() for name in names]
        )
    return clones


@contextmanager
def temporary_values(
    tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Inside the context, each tensor holds the value with its name. Afterwards each tensor holds
    its own value again. Yields copies of the tensors' own values.
    """
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    try:
        for name, tensor in tensors.items():
            tensor.copy_(values[name])
        yield own
    finally:
        for name, tensor in tensors.items():
            tensor.copy_(own[name])


def group_by_dtype_and_device(values: Mapping[T_, Tensor]) -> Iterable[list[T_]]:
    """The keys of `values`: one list for each pair of dtype and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[T_]] = {}
    for key, value in values.items():
        groups.setdefault((value.dtype, value.device), []).append(key)
    return groups.values()
