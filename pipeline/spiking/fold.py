"""Batch-norm folding: find the norm that follows a synapse, and move a scale of the weight into it.

For a > 0 per channel and the running statistics of eval mode,

    gain (a z + bias - mean) / sqrt(var + eps) + shift
        = (a gain) (z + bias / a - mean / a) / sqrt(var + eps) + shift

so a weight a W can be stored as W if the norm is the only consumer of the synapse's output.
"""

# T time, B batch

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.state import fresh_state, hooked


@torch.no_grad()
def following_norms(
    network: nn.Module, synapses: Mapping[str, nn.Module], x_TB: Tensor
) -> dict[str, str]:
    """The batch norm behind each of `synapses`, by name.

    The norm is the only consumer of the synapse's output and has no other input.

    The norms are found by running `network` on `x_TB`; the values of `x_TB` do not matter. Every
    operation on an output counts as a consumer. A synapse that does not run has no norm.
    """
    consumers = _Consumers()
    norms = {
        name: module for name, module in network.named_modules() if isinstance(module, BatchNorm)
    }
    was_training = network.training
    network.eval()
    hooks = [
        module.register_forward_hook(partial(consumers.made, name))
        for name, module in synapses.items()
    ]
    hooks += [
        norm.register_forward_pre_hook(partial(consumers.begins, name))
        for name, norm in norms.items()
    ]
    hooks += [norm.register_forward_hook(consumers.ends) for norm in norms.values()]
    with fresh_state(network), hooked(hooks), consumers:
        network(x_TB)
    network.train(was_training)
    followers = {}
    for name in synapses:
        consumed_by = consumers.of.get(name, set())
        only = next(iter(consumed_by)) if len(consumed_by) == 1 else None
        if only is not None and consumers.inputs[only] == {name}:
            followers[name] = only
    return followers


def fold(scale_O: Tensor, bias_O: Tensor | None, norm: BatchNorm) -> None:
    """Move a `scale_O` > 0 of the weight into `norm`, and into the bias before it, if any."""
    with torch.no_grad():
        norm.weight.copy_(norm.weight.double() * scale_O)
        norm.running_mean.copy_(norm.running_mean.double() / scale_O)
        if bias_O is not None:
            bias_O.copy_(bias_O.double() / scale_O)


class _Consumers(TorchDispatchMode):
    """Records the norm that consumes the output of each synapse; None: any other operation."""

    def __init__(self) -> None:
        super().__init__()
        # The tensor is kept alive so that no other tensor gets its id.
        self.outputs: dict[int, tuple[str, Tensor]] = {}
        self.running: str | None = None
        self.of: dict[str, set[str | None]] = {}
        self.inputs: dict[str, set[str | None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument in tree_leaves((args, kwargs)):
            if id(argument) in self.outputs:
                self.of.setdefault(self.outputs[id(argument)][0], set()).add(self.running)
        return func(*args, **(kwargs or {}))

    def made(self, name: str, _: nn.Module, __: Any, y_TB: Tensor) -> None:
        self.outputs[id(y_TB)] = (name, y_TB)

    def begins(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.running = name
        self.inputs.setdefault(name, set()).add(self.outputs.get(id(inputs[0]), (None,))[0])

    def ends(self, *_: Any) -> None:
        self.running = None
