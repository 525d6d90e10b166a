"""A linear readout behind each neuron of any network, for rules that learn from them (`spiking/topdown.py`)."""

from torch import nn

from pipeline.spiking.neuron import LIF
from pipeline.spiking.synapse import Conv2d, Linear
from pipeline.spiking.topdown import Readout


def with_readouts(network: nn.Module, classes: int = 10, *, cells: int = 1) -> nn.Module:
    """`network` with a `Readout` behind each LIF, which computes what it did before.

    A readout has as many channels as the synapse in front of its neuron, in order of registration. `cells` x `cells` places
    of an image are read, where there is one.

    Raises: ValueError for a network without neurons, a neuron without a synapse in front, or classes that differ from the
    network's own.
    """
    channels, places, placed = None, 1, 0
    for name, module in list(network.named_modules()):
        if isinstance(module, Conv2d):
            channels, places = module.out_channels, cells
        elif isinstance(module, Linear):
            channels, places = module.out_features, 1
        elif isinstance(module, LIF):
            if channels is None:
                raise ValueError(f"with_readouts: a synapse must stand in front of each neuron; got none before {name}")
            parent = network.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], nn.Sequential(module, Readout(channels, classes, cells=places)))
            placed += 1
    if not placed:
        raise ValueError(f"with_readouts: the network must have LIF neurons; got {type(network).__name__}")
    if channels != classes:
        raise ValueError(f"with_readouts: classes must be those of the network; got {classes}, and {channels} outputs")
    return network
