"""The trace of what a synapse saw, which OTTT and OPZO multiply with the error, and the models that
traces can be kept in.
"""

# T time, B batch

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pipeline.spiking.neuron import learnt_decays, named_neurons
from pipeline.spiking.norm import BatchNorm, is_foreign_norm
from pipeline.spiking.state import State, hooked
from pipeline.spiking.synapse import Conv2d, Linear


class Trace:
    """The seam `presynaptic` of a synapse: x[t] -> a[t] = decay a[t-1] + x[t], without a graph and
    never below fp32.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.state = State("Trace")

    @torch.no_grad()
    def __call__(self, x_TB: Tensor) -> Tensor:
        a_B = self.state.read("a")
        # A tensor of its own from the first step on: the factor must not be x itself.
        a_TB = torch.empty_like(x_TB, dtype=torch.promote_types(x_TB.dtype, torch.float32))
        for t, x_B in enumerate(x_TB.unbind(0)):
            a_B = (
                a_TB[t].copy_(x_B)
                if a_B is None
                else torch.add(x_B, a_B, alpha=self.decay, out=a_TB[t])
            )
        # What is remembered beyond the slice holds one step, not the slice.
        self.state.write("a", a_TB[-1] if len(a_TB) == 1 else a_TB[-1].clone())
        return a_TB


def shared_decay(who: str, model: nn.Module, decay: float | None = None) -> float:
    """The one decay of all neurons of `model`, at which traces of their inputs forget; a `decay`
    that
    is given must be it.

    Raises: ValueError, in the name of `who`, that names the neurons which differ, or which learn
    theirs.
    """
    if learnt := learnt_decays(model):
        raise ValueError(
            f"{who}: traces and rates take the decay for a constant, so it must not be learnt; got"
            f" PLIF at {', '.join(learnt)}"
        )
    decays = {name or "the model itself": neuron.decay for name, neuron in named_neurons(model)}
    if not decays:
        raise ValueError(
            f"{who}: the model must have LIF neurons, whose decay traces and rates share; got"
            f" {type(model).__name__}"
        )
    others = {name: each for name, each in decays.items() if each != decay}
    if decay is not None and others:
        raise ValueError(
            f"{who}: decay must be that of the neurons, which the traces feed; got {decay} and"
            f" {_listed(others)}"
        )
    if len(set(decays.values())) > 1:
        raise ValueError(f"{who}: the neurons must share one decay; got {_listed(decays)}")
    return next(iter(decays.values()))


def traceable_synapses(who: str, model: nn.Module) -> dict[str, Linear | Conv2d]:
    """Every synapse of `model` by module name, in order of registration.

    Raises: ValueError, in the name of `who`, for a layer with weights that cannot hold a trace, or
    a model without synapses."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (Linear, Conv2d)):
            found[name] = module
        elif isinstance(module, (nn.Linear, _ConvNd)):
            raise ValueError(
                f"{who}: the layers with weights must be of pipeline.spiking.synapse, which holds"
                f" the traces; got torch's {type(module).__name__} at {name}"
            )
    if not found:
        raise ValueError(
            f"{who}: the model must have synapses, which hold the traces; got"
            f" {type(model).__name__}"
        )
    return found


def refuse_batch_norm(who: str, model: nn.Module) -> None:
    """A normalised current is no sum over past inputs any more, so no trace can stand for it.

    Raises: ValueError, in the name of `who`, that names every batch norm of `model`.
    """
    names = [
        name or "the model itself"
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) or is_foreign_norm(module)
    ]
    if names:
        raise ValueError(
            f"{who}: a trace cannot pass batch norm; standardise the weights instead"
            f" (weights='standardized'); got batch norm at {', '.join(names)}"
        )


@contextmanager
def running_order(modules: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Fills with the names of `modules` as they run, each once for every time step that it is run
    on.
    """
    ran: list[str] = []

    def note(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ran.extend([name] * len(inputs[0]))

    with hooked(
        module.register_forward_pre_hook(partial(note, name)) for name, module in modules.items()
    ):
        yield ran


def _listed(decays: dict[str, float]) -> str:
    return ", ".join(f"{decay:g} at {name}" for name, decay in decays.items())
