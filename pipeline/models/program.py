"""Networks as programs of torch, whose files run where only torch is installed.

A program consists of torch's own operations, without the kernels of spiketrain. Its batch size is
free. `torch.export.save(program, file)` writes it. In another process, for one time step:

    program = torch.export.load(file)
    (_, states), _ = program.example_inputs
    states = {name: v_B.new_zeros(batch_size, *v_B.shape[1:]) for name, v_B in states.items()}
    for x_B in x_TB:
        logits_BK, states = program.module()(x_B, states)
"""

# T time, B batch, K classes

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.utils._pytree import tree_map

from pipeline.core.checks import require
from pipeline.spiking.equilibrium import Equilibrium
from pipeline.spiking.neuron import named_neurons
from pipeline.spiking.state import State, fresh_state, states_of


@torch.no_grad()
def to_program(
    network: nn.Module, shape: Sequence[int], *, steps: int | None = None
) -> ExportedProgram:
    """The program of a network in evaluation mode.

    Args:
        network: a network on `[T, B, *shape]`.
        shape: the shape of a sample at one time step, such as (C, H, W).
        steps: T of a program x_TB -> logits_TBK. None: the program of one time step,
            (x_B, states) -> (logits_BK, states). The states are the membranes v by name of the
            neuron, and 0 before the first step.

    Raises: ValueError for a network in training mode or with an `Equilibrium`, or for one time step
    of a network that remembers more than membranes.
    """
    require(not network.training, "to_program: the network must be in evaluation mode")
    require(
        not any(isinstance(module, Equilibrium) for module in network.modules()),
        "to_program: a network with an Equilibrium stops by its values, so no program can be made",
    )
    x_TB = torch.zeros(steps or 1, 2, *shape, dtype=next(network.parameters()).dtype)
    program, inputs = _Program(network, {}), (x_TB,)
    if steps is None:
        neurons = {name: neuron.state for name, neuron in named_neurons(network)}
        with fresh_state(network):
            network(x_TB)
            others = [each.owner for each in states_of(network) if each.values.keys() - {"v"}]
            require(
                not others,
                "to_program: a network that runs one time step must remember membranes alone; got"
                f" memory of {', '.join(others)}; set steps",
            )
            states = {name: torch.zeros_like(each.values["v"]) for name, each in neurons.items()}
        program, inputs = _Program(network, neurons), (x_TB[0], states)
    batch = {0 if steps is None else 1: Dim("batch")}
    dynamic = tree_map(lambda _: batch, inputs)
    return export(program.eval(), inputs, dynamic_shapes=dynamic, strict=False)


class _Program(nn.Module):
    """Runs all time steps of an input, or one time step with the states of `neurons`."""

    def __init__(self, network: nn.Module, neurons: dict[str, State]) -> None:
        super().__init__()
        self.network, self.neurons = network, neurons

    def forward(self, x: Tensor, states: dict[str, Tensor] | None = None) -> Any:
        with fresh_state(self.network):
            if states is None:
                return self.network(x)
            for name, v_B in states.items():
                self.neurons[name].write("v", v_B)
            logits_BK = self.network(x.unsqueeze(0)).squeeze(0)
            return logits_BK, {name: state.read("v") for name, state in self.neurons.items()}
