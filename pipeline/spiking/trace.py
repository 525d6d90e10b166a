"""Presynaptic traces, which OTTT and OPZO multiply with the error, and checks of their models."""

# T time, B batch

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pipeline.core.checks import require
from pipeline.spiking.neuron import learnt_decays, named_neurons
from pipeline.spiking.norm import BatchNorm, is_foreign_norm
from pipeline.spiking.state import State, hooked
from pipeline.spiking.synapse import Conv2d, Linear


class Trace:
    """The `presynaptic` seam x[t] -> a[t] = decay a[t-1] + x[t].

    It has no graph and is at least fp32.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.state = State("Trace")

    @torch.no_grad()
    def __call__(self, x_TB: Tensor) -> Tensor:
        a_B = self.state.read("a")
        # A new tensor from the first step on: the factor must not be x itself.
        a_TB = torch.empty_like(x_TB, dtype=torch.promote_types(x_TB.dtype, torch.float32))
        for t, x_B in enumerate(x_TB.unbind(0)):
            a_B = (
                a_TB[t].copy_(x_B)
                if a_B is None
                else torch.add(x_B, a_B, alpha=self.decay, out=a_TB[t])
            )
        # The stored trace has its own memory, so that it does not keep the whole slice alive.
        self.state.write("a", a_TB[-1] if len(a_TB) == 1 else a_TB[-1].clone())
        return a_TB


def shared_decay(who: str, model: nn.Module, decay: float | None = None) -> float:
    """The decay that all neurons of `model` share. Traces use it too.

    A given `decay` must equal it.

    Raises: ValueError, in the name of `who`, for neurons that differ or learn their decay, or for
    none.
    """
    learnt = learnt_decays(model)
    require(
        not learnt,
        f"{who}: traces and rates take the decay for a constant, so it must not be learnt; got"
        f" PLIF at {', '.join(learnt)}",
    )
    decays = {name or "the model itself": neuron.decay for name, neuron in named_neurons(model)}
    require(
        decays,
        f"{who}: the model must have LIF neurons, whose decay traces and rates share; got"
        f" {type(model).__name__}",
    )
    shared = next(iter(decays.values())) if decay is None else decay
    others = [f"{each:g} at {name}" for name, each in decays.items() if each != shared]
    require(
        not others,
        f"{who}: traces and all neurons must share one decay, here {shared:g}; got"
        f" {', '.join(others)}",
    )
    return shared


def traceable_synapses(who: str, model: nn.Module) -> dict[str, Linear | Conv2d]:
    """Every synapse of `model` by module name, in order of registration.

    Raises: ValueError, in the name of `who`, for a weight layer that cannot hold a trace, or a
    model without synapses.
    """
    synapses = {}
    for name, module in model.named_modules():
        if isinstance(module, (Linear, Conv2d)):
            synapses[name] = module
        elif isinstance(module, (nn.Linear, _ConvNd)):
            raise ValueError(
                f"{who}: the layers with weights must be of pipeline.spiking.synapse, which holds"
                f" the traces; got torch's {type(module).__name__} at {name}"
            )
    require(
        synapses,
        f"{who}: the model must have synapses, which hold the traces; got {type(model).__name__}",
    )
    return synapses


def refuse_batch_norm(who: str, model: nn.Module) -> None:
    """Refuse batch norm: a normalised current is not a sum over past inputs, so it has no trace.

    Raises: ValueError, in the name of `who`, that names every batch norm of `model`.
    """
    names = [
        name or "the model itself"
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) or is_foreign_norm(module)
    ]
    require(
        not names,
        f"{who}: a trace cannot pass batch norm; standardise the weights instead"
        f" (weights='standardized'); got batch norm at {', '.join(names)}",
    )


@contextmanager
def running_order(modules: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Yield a list that fills with the names of `modules` as they run, once per time step."""
    ran: list[str] = []

    def note(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ran.extend([name] * len(inputs[0]))

    with hooked(
        module.register_forward_pre_hook(partial(note, name)) for name, module in modules.items()
    ):
        yield ran
