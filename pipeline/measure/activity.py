"""Firing rates by layer and time step, and shares of always silent and always active neurons.

with Activity(network, every=8) as activity:
    for x_TB, index_B in batches:
        with activity.batch(index_B), fresh_state(network):
            network(x_TB)
activity.layers()
"""

# T time, B batch, C counted samples of it, R = T B rows, N neurons of a layer

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.random import COUNTED, below, bits
from pipeline.spiking.neuron import LIF, named_neurons

Reduce = Callable[[Tensor], Tensor]  # reduces a vector over ranks; collective


@dataclass(frozen=True, kw_only=True)
class LayerActivity:
    """Activity of one layer of neurons over a set of samples. Shares are in 0..1."""

    name: str
    neurons: int
    samples: int  # counted samples
    rates: tuple[float, ...]  # spikes per neuron at each time step
    silent: float  # share of neurons that never fired
    saturated: float  # share of neurons that fired at every time step of every sample

    @property
    def rate(self) -> float:
        """Spikes per neuron and time step."""
        return sum(self.rates) / len(self.rates)


def firing_rate(layers: Sequence[LayerActivity]) -> float:
    """Spikes per neuron and time step over all layers; NaN without a layer."""
    places = [each.neurons * len(each.rates) for each in layers]
    if not places:
        return math.nan
    return sum(each.rate * count for each, count in zip(layers, places, strict=True)) / sum(places)


class Activity:
    """Counts the spikes of every neuron of `network` inside the `with` block.

    It takes 4 bytes per neuron and time step, and is exact up to 2^24 samples. It reads only
    spikes, and waits for a GPU only in `layers`.

    Args:
        every: counts one in `every` samples, drawn by their ids. The draw is the same for any
            number of workers, and independent of the order of classes in the set.
    """

    def __init__(self, network: nn.Module, *, every: int = 1) -> None:
        self.every = every
        self._samples = 0
        self._neurons = named_neurons(network)
        self._layers = [_Layer() for _ in self._neurons]
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for (_, neuron), layer in zip(self._neurons, self._layers, strict=True):
            self._hooks.append(neuron.register_forward_hook(layer.record))
        return self

    def __exit__(self, *exc: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    @contextmanager
    def batch(self, index_B: Tensor) -> Iterator[None]:
        """Surround the time steps of the samples with these ids. They may run in slices."""
        places = self.places(index_B.numpy())
        for layer in self._layers:
            layer.step, layer.places = 0, places
        yield
        self._samples += len(places)

    def places(self, ids: NDArray[np.int64]) -> tuple[int, ...]:
        """Positions of the counted samples in `ids`."""
        return tuple(np.flatnonzero(below(bits(0, 0, ids, COUNTED), self.every) == 0).tolist())

    def layers(
        self, total: Reduce = torch.clone, largest: Reduce = torch.clone
    ) -> tuple[LayerActivity, ...]:
        """Activity over all ranks, in order of construction. Collective.

        `total` sums over ranks, `largest` takes the maximum; the defaults are those of one rank.
        Layers that never ran are omitted. If no sample was counted, all layers are.
        """
        if not self._layers:
            return ()
        sizes_L2 = largest(torch.tensor([layer.fired_TN.shape for layer in self._layers])).tolist()
        widened = [
            _widened(layer.fired_TN.cpu(), steps, neurons)
            for layer, (steps, neurons) in zip(self._layers, sizes_L2, strict=True)
        ]
        by_step = [fired_TN.sum(1, dtype=torch.float64) for fired_TN in widened]
        by_step.append(torch.tensor([self._samples], dtype=torch.float64))
        *by_step, samples = total(torch.cat(by_step)).split([*(steps for steps, _ in sizes_L2), 1])
        by_neuron = [fired_TN.sum(0, dtype=torch.int32) for fired_TN in widened]
        by_neuron = total(torch.cat(by_neuron)).split([neurons for _, neurons in sizes_L2])
        return tuple(
            LayerActivity(
                name=name,
                neurons=len(spikes_N),
                samples=int(samples),
                rates=tuple((spikes_T / (samples * len(spikes_N))).tolist()),
                silent=float((spikes_N == 0).double().mean()),
                saturated=float((spikes_N == len(spikes_T) * int(samples)).double().mean()),
            )
            for (name, _), spikes_T, spikes_N in zip(self._neurons, by_step, by_neuron, strict=True)
            if len(spikes_N) and samples
        )


class _Layer:
    def __init__(self) -> None:
        self.fired_TN = torch.zeros(0, 0)  # spikes of each neuron at each time step
        self.step = 0
        self.places: tuple[int, ...] = ()  # of the counted samples in the current batch

    @torch.no_grad()
    def record(self, neuron: nn.Module, _: Any, s_TB: Tensor) -> None:
        """Add the output of `neuron`. This is a forward hook."""
        if not self.places:
            return
        steps, batch = s_TB.shape[:2]
        s_RN = s_TB.reshape(steps * batch, -1)
        row_TC, first_T = _rows(self.places, steps, batch, s_TB.device)
        # Each spike of LIF's own step is a 1. Those of a rate neuron have a height, and a rule's
        # gradient function may change them.
        fires_ones = (
            isinstance(neuron, LIF)
            and type(neuron).step is LIF.step
            and neuron.custom_forward is None
        )
        if fires_ones and s_TB.dtype == torch.float32:
            # sums the rows in place, without copying them
            fired_TN = torch.embedding_bag(s_RN, row_TC, first_T)[0]
        else:
            fired_TN = torch.ne(s_RN[row_TC.view(steps, -1)], 0).sum(1, dtype=torch.float32)
        first, self.step = self.step, self.step + steps
        if len(self.fired_TN) < self.step:
            self.fired_TN = _widened(self.fired_TN, self.step, s_RN.shape[1]).to(s_TB.device)
        self.fired_TN[first : self.step].add_(fired_TN)


def _widened(fired_TN: Tensor, steps: int, neurons: int) -> Tensor:
    return F.pad(fired_TN, (0, neurons - fired_TN.shape[1], 0, steps - fired_TN.shape[0]))


@lru_cache(maxsize=8)
def _rows(
    places: tuple[int, ...], steps: int, batch: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rows of the samples at `places` in spikes [T B, ...]: [T C]; first row of each step: [T].

    They are made once for all layers of a batch. A layer has just filled the caches, so there the
    smallest operation of torch takes as long as a loop over a batch.
    """
    row_TC = torch.tensor([step * batch + place for step in range(steps) for place in places])
    first_T = torch.arange(0, len(row_TC), len(places))
    return row_TC.to(device, non_blocking=True), first_T.to(device, non_blocking=True)
