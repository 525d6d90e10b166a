"""A linear readout behind each neuron of any network, for rules that learn from them
(`spiking/local_learning.py`).
"""

from collections.abc import Sequence

from torch import nn

from pipeline.spiking.local_learning import Readout
from pipeline.spiking.neuron import LIF
from pipeline.spiking.synapse import Conv2d, Linear


def with_readouts(
    network: nn.Module, classes: int = 10, *, cells: int | Sequence[int] = 1
) -> nn.Module:
    """`network` with a `Readout` behind each LIF, which computes what it did before.

    A readout has as many channels as the synapse in front of its neuron, in order of registration.
    `cells` x `cells` places of an image are read, where there is one; several numbers are those of
    one neuron after another.

    Raises: ValueError for a network without neurons, a neuron without a synapse in front, another
    number of `cells` than neurons, or classes that differ from the network's own.
    """
    modules = list(network.named_modules())
    neurons = sum(isinstance(module, LIF) for _, module in modules)
    every = [cells] * neurons if isinstance(cells, int) else list(cells)
    if len(every) != neurons:
        raise ValueError(
            f"with_readouts: cells must be one number, or one for each of {neurons} neurons; got"
            f" {every}"
        )
    channels, on_image, placed = None, False, 0
    for name, module in modules:
        if isinstance(module, Conv2d):
            channels, on_image = module.out_channels, True
        elif isinstance(module, Linear):
            channels, on_image = module.out_features, False
        elif isinstance(module, LIF):
            if channels is None:
                raise ValueError(
                    "with_readouts: a synapse must stand in front of each neuron; got none before"
                    f" {name}"
                )
            parent = network.get_submodule(name.rpartition(".")[0])
            readout = Readout(channels, classes, cells=every[placed] if on_image else 1)
            setattr(parent, name.rpartition(".")[2], nn.Sequential(module, readout))
            placed += 1
    if not placed:
        raise ValueError(
            f"with_readouts: the network must have LIF neurons; got {type(network).__name__}"
        )
    if channels != classes:
        raise ValueError(
            f"with_readouts: classes must be those of the network; got {classes}, and {channels}"
            " outputs"
        )
    return network
