"""Presynaptic traces, and checks of the models that are trained with them (OTTT, OPZO)."""

# T time, B batch

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pipeline.core.checks import require
from pipeline.core.units import first_few
from pipeline.spiking.neuron import learnt_decays, named_neurons
from pipeline.spiking.norm import BatchNorm, is_foreign_norm
from pipeline.spiking.state import State, temporary_hooks
from pipeline.spiking.synapse import Conv2d, Linear, request_seams


class Trace:
    """The trace a[t] = decay a[t-1] + x[t] of a synapse's input x.

    A rule sets it as the attribute `presynaptic` of the synapse. The trace has no graph and at
    least fp32.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.state = State("Trace")

    @torch.no_grad()
    def __call__(self, x_TB: Tensor) -> Tensor:
        a_B = self.state.read("a")
        # A new tensor, also at the first step: the trace must not share memory with x.
        a_TB = torch.empty_like(x_TB, dtype=torch.promote_types(x_TB.dtype, torch.float32))
        for t, x_B in enumerate(x_TB.unbind(0)):
            a_B = (
                a_TB[t].copy_(x_B)
                if a_B is None
                else torch.add(x_B, a_B, alpha=self.decay, out=a_TB[t])
            )
        # The stored trace has memory of its own, so that it does not keep the whole slice alive.
        self.state.write("a", a_TB[-1] if len(a_TB) == 1 else a_TB[-1].clone())
        return a_TB


def shared_decay(error_prefix: str, model: nn.Module, decay: float | None = None) -> float:
    """The decay that all neurons of `model` share. Traces and rates use the same decay.

    Raises: ValueError, which starts with `error_prefix`, for a model without neurons, for learnt or
    different decays of neurons, or for a `decay` that differs from the decay of the neurons.
    """
    learnt = learnt_decays(model)
    require(
        not learnt,
        f"{error_prefix}: the decay of neurons must be a constant, because traces and rates use it;"
        f" got the learnt decay of PLIF at {', '.join(learnt)}",
    )
    decays = {name or "the model itself": neuron.decay for name, neuron in named_neurons(model)}
    require(
        decays,
        f"{error_prefix}: the model must have LIF neurons, because traces and rates use their"
        f" decay; got {type(model).__name__}",
    )
    shared = next(iter(decays.values())) if decay is None else decay
    others = [f"{each:g} at {name}" for name, each in decays.items() if each != shared]
    require(
        not others,
        f"{error_prefix}: traces and all neurons must share one decay, here {shared:g}; got"
        f" {', '.join(others)}",
    )
    return shared


def traceable_synapses(error_prefix: str, model: nn.Module) -> dict[str, Linear | Conv2d]:
    """Every synapse of `model` by module name, in order of registration.

    Raises: ValueError, which starts with `error_prefix`, for a linear layer or convolution of
    torch, which cannot have a trace, or for a model without synapses.
    """
    request_seams(model)
    synapses = {}
    for name, module in model.named_modules():
        if isinstance(module, (Linear, Conv2d)):
            synapses[name] = module
        elif isinstance(module, (nn.Linear, _ConvNd)):
            raise ValueError(
                f"{error_prefix}: linear layers and convolutions must be those of"
                " pipeline.spiking.synapse, because only these can have a trace; got torch's"
                f" {type(module).__name__} at {name}"
            )
    require(
        synapses,
        f"{error_prefix}: the model must have a synapse (pipeline.spiking.synapse); got"
        f" {type(model).__name__}",
    )
    return synapses


def refuse_batch_norm(error_prefix: str, model: nn.Module) -> None:
    """Refuse batch norm: a normalised current is not a sum over past inputs, so it has no trace.

    Raises: ValueError, which starts with `error_prefix` and names the first batch norms of `model`.
    """
    names = [
        name or "the model itself"
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) or is_foreign_norm(module)
    ]
    require(
        not names,
        f"{error_prefix}: a trace cannot pass batch norm; standardise the weights instead"
        f" (weights='standardized'); got batch norm at {first_few(names, max_names=3)}",
    )


@contextmanager
def running_order(modules: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Yield a list. Each of `modules` appends its name for each time step of its input."""
    order: list[str] = []

    def append(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        order.extend([name] * len(inputs[0]))

    with temporary_hooks(
        module.register_forward_pre_hook(partial(append, name)) for name, module in modules.items()
    ):
        yield order
