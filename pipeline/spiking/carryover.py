"""A spiking network read as networks of binary activations with noise: the noise is what its membranes carry over a time step.

    u[t] = x[t] + n[t],   s[t] = 1 if u[t] >= threshold else 0,        n[t] = leak v[t-1],  n[1] = 0

with x the current as `LIF.step` scales it. Let n[t] be a constant, and step t is a network of threshold units without memory.
The T steps are T such networks, of the same weights under different noise, and the mean of their logits is their ensemble.
Differentiated, that is the graph of SLTT: the membrane that crosses a time step is a constant there too.

`record` keeps the carry-over of a run; `replaying` makes of the same model the network of binary activations, with this
carry-over, or another one, from outside.

Source: the view is that of Meng et al. 2025 (SEI-BWSNN, arXiv 2508.12609), of which only the abstract is public; the equations
are a reconstruction.
"""

# T time, B batch, C channels, N units of a layer

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.spiking.neuron import LIF, named_neurons
from pipeline.spiking.noise import noise
from pipeline.spiking.over_samples import OverSamples
from pipeline.spiking.state import State, fresh_state


@dataclass(frozen=True)
class CarryOver:
    """v[t-1] `[B, ...]` of every neuron by module name, for t = 1..T.

    The noise is `leak` times that. It is kept before it is multiplied, as a neuron adds both in one rounding: what is
    replayed then differs in no bit.
    """

    membranes: Mapping[str, Sequence[Tensor]]

    @property
    def steps(self) -> int:
        return len(next(iter(self.membranes.values())))

    @property
    def bytes(self) -> int:
        """T membranes of every neuron, where a running network holds one."""
        return sum(v_B.numel() * v_B.element_size() for steps in self.membranes.values() for v_B in steps)

    def changed(self, change: Callable[[str, int, Tensor], Tensor]) -> CarryOver:
        """With `change(name, t, v_B)` in the place of each membrane; t counts from 0."""
        return CarryOver({name: [change(name, t, v_B) for t, v_B in enumerate(steps)] for name, steps in self.membranes.items()})

    def zero(self) -> CarryOver:
        """Nothing is carried over: T times the same network."""
        return self.changed(lambda name, t, v_B: torch.zeros_like(v_B))

    def of_others(self, donors_B: Tensor) -> CarryOver:
        """Sample b gets what sample `donors_B[b]` carries over, the same donor in all neurons and steps: the noise keeps its
        joint distribution and knows nothing of the sample."""
        return self.changed(lambda name, t, v_B: v_B[donors_B])


@torch.no_grad()
def record(model: nn.Module, x_TB: Tensor) -> tuple[Tensor, CarryOver]:
    """Run a model on a batch, all T steps at once, as it stands: its logits `[T, B, K]`, and what it carried over.

    Raises: ValueError for a model whose carry-over is not that of its membranes alone, or a neuron that does not run once a step.
    """
    neurons = _neurons(model)
    kept: dict[str, list[Tensor]] = {name: [] for name in neurons}
    before = {name: neuron.carry for name, neuron in neurons.items()}
    for name, neuron in neurons.items():
        neuron.carry = _keeping(neuron.carry, kept[name])
    try:
        with fresh_state(model):
            logits_TBK = model(x_TB)
    finally:
        for name, neuron in neurons.items():
            neuron.carry = before[name]
    steps = len(x_TB)
    for name, v in kept.items():
        if len(v) not in (0, steps):
            raise ValueError(f"record: every neuron must run once a time step; got {len(v)} times in {steps} steps at {name}")
    # What the last step leaves is carried nowhere; the first begins at rest.
    return logits_TBK, CarryOver({name: [torch.zeros_like(v[0]), *v[:-1]] for name, v in kept.items() if v})


@contextmanager
def replaying(model: nn.Module, carry_over: CarryOver) -> Iterator[None]:
    """Inside, `model` is the network of binary activations of its weights, with `carry_over` as a constant from outside.

    All T steps at once equal T slices. Its parameters are the model's own, so it can be differentiated.

    Raises: ValueError for neurons that were not recorded; when run, for more steps or another batch than were.
    """
    neurons = _neurons(model)
    unknown = sorted(carry_over.membranes.keys() - neurons.keys())
    if unknown:
        raise ValueError(f"replaying: the carry-over must be one of this model; got neurons that it lacks: {', '.join(unknown)}")
    for name, neuron in neurons.items():
        neuron.gradient = Replay(name, carry_over.membranes.get(name, ()))
    try:
        yield
    finally:
        for neuron in neurons.values():
            neuron.gradient = None


class Replay:
    """The seam `LIF.gradient` of a threshold unit without memory: s[t] from x[t] and a v[t-1] that was given to it."""

    def __init__(self, name: str, membranes: Sequence[Tensor]) -> None:
        self.name = name
        self.membranes = membranes
        self.state = State("Replay")

    def __call__(self, lif: LIF, x_TB: Tensor) -> Tensor:
        done = self.state.read("steps")
        first = 0 if done is None else int(done)
        last = first + len(x_TB)
        if last > len(self.membranes):
            raise ValueError(f"replaying: {self.name} must run for the steps recorded; got {last} of {len(self.membranes)}")
        self.state.write("steps", torch.tensor(last))
        # One step after another, as in the run: then not even the order of vectorised arithmetic differs.
        spikes = []
        for x_B, v_B in zip(x_TB.unbind(0), self.membranes[first:last], strict=True):
            if v_B.shape != x_B.shape:
                raise ValueError(
                    f"replaying: {self.name} must have the shape recorded, {tuple(v_B.shape)}; got {tuple(x_B.shape)}"
                )
            s_B, _ = lif.step(x_B.to(v_B.dtype), v_B)
            spikes.append(s_B.to(x_TB.dtype))
        return torch.stack(spikes)


class Gaussian:
    """Noise of a carry-over's mean and variance, in each channel of each neuron at each step, and nothing else of it.

    Channels are the first dimension behind the batch; places within one count as samples. The moments are those of
    `examples`, summed in float64.

    Raises: ValueError without examples, or for a carry-over of more steps or of neurons that they lack.
    """

    def __init__(self, examples: Iterable[CarryOver]) -> None:
        self.samples = 0
        sums: dict[tuple[str, int], tuple[int, Tensor, Tensor]] = {}
        for example in examples:
            self.samples += len(next(iter(example.membranes.values()))[0])
            for name, steps in example.membranes.items():
                for t, v_B in enumerate(steps):
                    v_NC = _by_channel(v_B)
                    count, sum_C, square_C = sums.get((name, t), (0, v_NC.new_zeros(()), v_NC.new_zeros(())))
                    sums[name, t] = count + len(v_NC), sum_C + v_NC.sum(0), square_C + v_NC.square().sum(0)
        if not self.samples:
            raise ValueError("Gaussian: moments need examples of a carry-over; got none")
        self.moments: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        for key, (count, sum_C, square_C) in sums.items():
            mean_C = sum_C / count
            self.moments[key] = mean_C, (square_C / count - mean_C.square()).clamp_min(0).sqrt()
        self._places = {name: place for place, name in enumerate(dict.fromkeys(name for name, _ in sums))}

    def like(self, carry_over: CarryOver, keys_of: Callable[[int, int], Sequence[int]]) -> CarryOver:
        """A draw in the shapes of `carry_over`; `keys_of(place, t)` is a key of 64 bits for each sample (`spiking/noise.py`)."""

        def drawn(name: str, t: int, v_B: Tensor) -> Tensor:
            if (name, t) not in self.moments:
                raise ValueError(f"Gaussian: the examples must hold what is drawn; got no moments of {name} at step {t + 1}")
            mean_C, deviation_C = (each.view(-1, *[1] * (v_B.dim() - 2)) for each in self.moments[name, t])
            keys = keys_of(self._places[name], t)
            z_B = noise(keys, v_B[0].numel(), distribution="gaussian", device=v_B.device).view_as(v_B)
            return (mean_C + deviation_C * z_B).to(v_B.dtype)

        return carry_over.changed(drawn)


def _by_channel(v_B: Tensor) -> Tensor:
    """`[B, C, ...]` to `[N, C]` in float64, N the samples and places."""
    return v_B.double().movedim(1, -1).flatten(0, -2)


def _keeping(carry: Callable[[Tensor], Tensor], kept: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def keep(v_B: Tensor) -> Tensor:
        v_B = carry(v_B)
        kept.append(v_B)
        return v_B

    return keep


def _neurons(model: nn.Module) -> dict[str, LIF]:
    """The neurons of a model that carries nothing but their membranes from step to step."""
    neurons: dict[str, Any] = dict(named_neurons(model))
    if not neurons:
        raise ValueError(f"carry-over: the model must have LIF neurons, whose membranes it is; got {type(model).__name__}")
    for name, module in model.named_modules():
        where = name or "the model itself"
        if hasattr(module, "carry") and not isinstance(module, LIF):
            raise ValueError(
                f"carry-over: must be that of membranes alone; got {type(module).__name__}, with its own, at {where}"
            )
        if isinstance(module, OverSamples):
            raise ValueError(
                f"carry-over: a membrane must be one sample's; got OverSamples, which goes on to the next, at {where}"
            )
        if isinstance(module, LIF) and module.gradient is not None:
            raise ValueError(f"carry-over: a neuron must run as it is, so release the rule that replaces it; got one at {where}")
    return neurons
