"""How often neurons fire: by layer and time step, and which of them never do, or always.

with Activity(network) as activity:
    for x_TB in batches:
        with activity.batch(x_TB.shape[1]), fresh_state(network):
            network(x_TB)
activity.layers()
"""

# T time, B batch, N neurons of a layer

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.spiking.neuron import named_neurons

Reduce = Callable[[Tensor], Tensor]
"""of a vector over ranks; collective"""


def alone(value: Tensor) -> Tensor:
    """`Reduce` of one rank."""
    return value


@dataclass(frozen=True, kw_only=True)
class LayerActivity:
    """Of one layer of neurons over a set of samples. Shares in 0..1."""

    name: str
    neurons: int
    rates: tuple[float, ...]
    """spikes per neuron at each time step"""
    silent: float
    """neurons that never fired"""
    saturated: float
    """neurons that fired at every time step of every sample"""

    @property
    def rate(self) -> float:
        """Spikes per neuron and time step."""
        return sum(self.rates) / len(self.rates)


def firing_rate(layers: Sequence[LayerActivity]) -> float:
    """Spikes per neuron and time step of all layers together; 0 without neurons."""
    places = [each.neurons * len(each.rates) for each in layers]
    return sum(each.rate * count for each, count in zip(layers, places, strict=True)) / max(1, sum(places))


class Activity:
    """Counts the spikes of every neuron of `network` while it is entered: 4 bytes a neuron."""

    def __init__(self, network: nn.Module) -> None:
        self._samples = 0
        self._neurons = named_neurons(network)
        self._layers = [_Layer() for _ in self._neurons]
        self._hooks: list[Any] = []

    def __enter__(self) -> Activity:
        for (_, neuron), layer in zip(self._neurons, self._layers, strict=True):
            self._hooks.append(neuron.register_forward_hook(lambda _, __, s_TB, layer=layer: layer.add(s_TB)))
        return self

    def __exit__(self, *exc: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    @contextmanager
    def batch(self, samples: int) -> Iterator[None]:
        """Surrounds the time steps of so many samples, which may come in slices."""
        for layer in self._layers:
            layer.step = 0
        yield
        self._samples += samples

    def layers(self, total: Reduce = alone, largest: Reduce = alone) -> tuple[LayerActivity, ...]:
        """In the order of construction, over all ranks, each of which calls it; layers that nobody ran are left out."""
        if not self._layers:
            return ()
        sizes_L2 = largest(torch.tensor([layer.size for layer in self._layers], dtype=torch.int64)).tolist()
        widened = [layer.widened(steps, neurons) for layer, (steps, neurons) in zip(self._layers, sizes_L2, strict=True)]
        empty_T, empty_N = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int32)
        steps_T = total(torch.cat([empty_T, *(by_step_T for by_step_T, _ in widened), empty_T.new_tensor([self._samples])]))
        neurons_N = total(torch.cat([empty_N, *(by_neuron_N for _, by_neuron_N in widened)]))
        *by_step, samples = steps_T.split([*(steps for steps, _ in sizes_L2), 1])
        by_neuron = neurons_N.split([neurons for _, neurons in sizes_L2])
        found = []
        for (name, _), spikes_T, spikes_N in zip(self._neurons, by_step, by_neuron, strict=True):
            if len(spikes_N):
                rates = (spikes_T / (samples * len(spikes_N))).tolist()
                always = (spikes_N == len(spikes_T) * int(samples)).double().mean()
                never = (spikes_N == 0).double().mean()
                shares = {"silent": float(never), "saturated": float(always)}
                found.append(LayerActivity(name=name, neurons=len(spikes_N), rates=tuple(rates), **shares))
        return tuple(found)


class _Layer:
    """Spikes so far, by time step and by neuron."""

    def __init__(self) -> None:
        self.by_step_T = torch.zeros(0, dtype=torch.float64)
        self.by_neuron_N = torch.zeros(0, dtype=torch.int32)
        self.step = 0

    @property
    def size(self) -> tuple[int, int]:
        return len(self.by_step_T), len(self.by_neuron_N)

    def add(self, s_TB: Tensor) -> None:
        fired_TN = (s_TB != 0).sum(1, dtype=torch.int32).flatten(1)
        steps, neurons = fired_TN.shape
        by_step_T, by_neuron_N = self.widened(max(len(self.by_step_T), self.step + steps), neurons)
        by_step_T[self.step : self.step + steps] += fired_TN.sum(1).cpu()
        self.by_step_T, self.by_neuron_N = by_step_T, by_neuron_N.to(s_TB.device) + fired_TN.sum(0, dtype=torch.int32)
        self.step += steps

    def widened(self, steps: int, neurons: int) -> tuple[Tensor, Tensor]:
        """Both, of this size: what was not run has no spikes."""
        by_step_T = torch.cat([self.by_step_T, self.by_step_T.new_zeros(steps - len(self.by_step_T))])
        by_neuron_N = self.by_neuron_N if len(self.by_neuron_N) else self.by_neuron_N.new_zeros(neurons)
        return by_step_T, by_neuron_N
