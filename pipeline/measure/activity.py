"""Firing rates by layer and time step, and shares of always silent and always active neurons.

with Activity(network, every=8) as activity:
    for x_TB, index_B in batches:
        with activity.batch(index_B), fresh_state(network):
            network(x_TB)
activity.layers()
"""

# T time, B batch, C counted samples of a batch, R = T B rows, N neurons of a layer, L layers

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
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
    sizes = [layer.neurons * len(layer.rates) for layer in layers]
    if not sizes:
        return math.nan
    return sum(layer.rate * size for layer, size in zip(layers, sizes, strict=True)) / sum(sizes)


class Activity:
    """Counts the spikes of every neuron of `network` inside the `with` block.

    The counts of a layer take 4 bytes per neuron and 8 per time step. They are exact up to 2^24
    spikes of one neuron. Only `layers` waits for a GPU.

    Args:
        every: one in `every` samples is counted. The draw depends only on the samples' ids, not on
            the number of workers or the order of classes in the set.
    """

    def __init__(self, network: nn.Module, *, every: int = 1) -> None:
        self.every = every
        self._samples = 0
        self._neurons = named_neurons(network)
        self._layers = [_SpikeCounts() for _ in self._neurons]
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for (_, neuron), layer in zip(self._neurons, self._layers, strict=True):
            self._hooks.append(neuron.register_forward_hook(layer.record, with_kwargs=True))
        return self

    def __exit__(self, *exc: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    @contextmanager
    def batch(self, index_B: Tensor) -> Iterator[None]:
        """Surround the time steps of one batch, which may run in slices.

        `index_B`: the ids of the batch's samples.
        """
        rows = self.counted_rows(index_B.numpy())
        for layer in self._layers:
            layer.step, layer.batch_rows = 0, rows
        yield
        self._samples += len(rows)

    def counted_rows(self, ids: NDArray[np.int64]) -> tuple[int, ...]:
        """Positions of the counted samples in `ids`."""
        return tuple(np.flatnonzero(below(bits(0, 0, ids, COUNTED), self.every) == 0).tolist())

    def layers(
        self, reduce_sum: Reduce = torch.clone, reduce_max: Reduce = torch.clone
    ) -> tuple[LayerActivity, ...]:
        """Activity over all ranks, in order of construction. Collective.

        `reduce_sum` and `reduce_max` reduce over ranks; the defaults are for a single rank. Layers
        that never ran are omitted. If no sample was counted, all layers are omitted.
        """
        if not self._layers:
            return ()
        sizes_L2 = reduce_max(
            torch.tensor([[len(each.by_step_T), len(each.by_neuron_N)] for each in self._layers])
        )
        steps, neurons = sizes_L2.T.tolist()
        by_step = [
            _pad(x.by_step_T.cpu(), size) for x, size in zip(self._layers, steps, strict=True)
        ]
        by_step.append(torch.tensor([self._samples], dtype=torch.float64))
        *by_step, samples = reduce_sum(torch.cat(by_step)).split([*steps, 1])
        by_neuron = [
            _pad(x.by_neuron_N.cpu(), size).int()
            for x, size in zip(self._layers, neurons, strict=True)
        ]
        by_neuron = reduce_sum(torch.cat(by_neuron)).split(neurons)
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


class _SpikeCounts:
    def __init__(self) -> None:
        # Spikes of the counted samples: of all neurons at each step, and of each neuron at all
        # steps. A table of steps and neurons would grow with T.
        self.by_step_T = torch.zeros(0, dtype=torch.float64)
        self.by_neuron_N = torch.zeros(0)
        self.step = 0
        self.batch_rows: tuple[int, ...] = ()  # of the counted samples in the current batch

    @torch.no_grad()
    def record(self, neuron: nn.Module, _: Any, arguments: Mapping[str, Any], s_TB: Tensor) -> None:
        """Add the output of `neuron`. This is a forward hook."""
        if not self.batch_rows:
            return
        steps, batch = s_TB.shape[:2]
        s_RN = s_TB.reshape(steps * batch, -1)
        row_TC, first_T = _rows(self.batch_rows, steps, batch, s_TB.device)
        # LIF.step emits spikes of one value. A rate neuron emits other values, and a rule's
        # custom_forward may change the values.
        fires_ones = (
            isinstance(neuron, LIF)
            and type(neuron).step is LIF.step
            and neuron.custom_forward is None
        )
        if fires_ones and s_TB.dtype == torch.float32:
            # sums the rows without copying them
            spikes_TN = torch.embedding_bag(s_RN, row_TC, first_T)[0]
            if (gain := arguments.get("gain", 1.0)) != 1:
                spikes_TN = (spikes_TN / gain).round_()
        else:
            spikes_TN = torch.ne(s_RN[row_TC.view(steps, -1)], 0).sum(1, dtype=torch.float32)
        first, self.step = self.step, self.step + steps
        if len(self.by_step_T) < self.step:
            to_device = partial(Tensor.to, device=s_TB.device, non_blocking=True)
            self.by_step_T = _pad(to_device(self.by_step_T), self.step)
            self.by_neuron_N = _pad(to_device(self.by_neuron_N), s_RN.shape[1])
        self.by_step_T[first : self.step].add_(spikes_TN.sum(1, dtype=torch.float64))
        self.by_neuron_N.add_(spikes_TN.sum(0))


def _pad(counts: Tensor, length: int) -> Tensor:
    return F.pad(counts, (0, length - len(counts)))


@lru_cache(maxsize=8)
def _rows(
    batch_rows: tuple[int, ...], steps: int, batch: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rows of the counted samples in spikes `[R, N]`, and the position of each step's first row.

    They are computed once per batch and shared by all layers, because even the smallest torch
    operation is slow in a hook: the layer has just filled the CPU's caches.
    """
    row_TC = torch.tensor([step * batch + row for step in range(steps) for row in batch_rows])
    first_T = torch.arange(0, len(row_TC), len(batch_rows))
    return row_TC.to(device, non_blocking=True), first_T.to(device, non_blocking=True)
