"""Local learning: layers that learn from a signal and pass no gradient to the layer below.

`LocalGradient` is the seam that a rule sets on each neuron. The neuron then outputs its spikes
(with noise, if the rule asks for it) without a graph. It records the spikes with the graph of its
own layer, which ends at the synapse that feeds it. `inject_gradients` builds a scalar whose value
is the loss and whose gradient at each layer's spikes is that layer's signal.

    noise on spikes     s[t] = LIF(x[t]),   out[t] = s[t] + alpha z[t]
    noise on membrane   s[t] = 1 if u[t] + alpha z[t] >= threshold
    backward            dL/dx[t] = psi(u[t]) g[t],   g[t] the signal
                        (with noise on the membrane: psi(u[t] + alpha z[t]) g[t])
"""

# T time, B batch, N units of a layer, K outputs

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.checks import refuse_unless_counts, require
from pipeline.spiking.neuron import LIF
from pipeline.spiking.noise import Distribution, noise
from pipeline.spiking.state import State, hooked
from pipeline.spiking.synapse import Linear, folded

Inject = Literal["spikes", "membrane"]


class Readout(nn.Module):
    """A linear readout of the preceding neuron. Only rules that ask for it use it.

    As a module of the network it is the identity. `logits(s_TB)` averages each channel of an image
    over `cells` x `cells` regions and maps them to the classes: `[T, B, C]` or `[T, B, C, H, W]` to
    `[T, B, K]`.

    Raises: ValueError for numbers below 1, or spikes of another shape.
    """

    def __init__(self, channels: int, classes: int, *, cells: int = 1) -> None:
        super().__init__()
        refuse_unless_counts("Readout", {"channels": channels, "classes": classes, "cells": cells})
        self.channels = channels
        self.cells = cells
        self.linear = Linear(channels * cells**2, classes)

    def forward(self, s_TB: Tensor) -> Tensor:
        return s_TB

    def logits(self, s_TB: Tensor) -> Tensor:
        require(
            s_TB.shape[2] == self.channels and s_TB.dim() in ((3, 5) if self.cells == 1 else (5,)),
            f"Readout: needs {self.channels} channels on {self.cells} x {self.cells} places;"
            f" got shape {tuple(s_TB.shape)}",
        )
        if s_TB.dim() == 5:
            s_TB = folded(lambda s_NCHW: F.adaptive_avg_pool2d(s_NCHW, self.cells), s_TB).flatten(2)
        return self.linear(s_TB)

    def extra_repr(self) -> str:
        return f"{self.channels}, cells={self.cells}"


class LocalGradient:
    """The seam `LIF.gradient` of one layer. A rule opens it for each time step that it learns from.

    While `is_open` the neuron runs as at the head of the file. It records, until the batch ends,
    `spikes` with the graph of its own layer, `z` if noise is added, and the `logits` of its
    `readout` if it has one. Otherwise it is the plain neuron, so an evaluation has no noise.

    `scale` is alpha, in spikes or in units of the membrane. Noise on the membrane decides on the
    spike and is not carried to the next step. A rule sets `keys`, one per sample (none: no noise),
    and `sign`. A negative sign reuses the noise of the step before.
    """

    def __init__(
        self,
        *,
        scale: float,
        inject: Inject,
        distribution: Distribution,
        readout: Readout | None = None,
    ) -> None:
        self.scale = scale
        self.inject = inject
        self.distribution: Distribution = distribution
        self.readout = readout
        self.state = State("LocalGradient")
        self.is_open = False
        self.keys: Sequence[int] = ()
        self.sign = 1.0

    def recorded(self, name: str) -> Tensor:
        """The recorded tensor of the last step.

        It is `spikes` or `logits` `[T, B, ...]` with graph, or `z` `[B, N]` including its sign.
        """
        value = self.state.read(name)
        require(
            value is not None,
            "LocalGradient: the network must run every neuron at every time step; got one without"
            f" {name}",
        )
        return value  # type: ignore[return-value]

    def __call__(self, lif: LIF, x_TB: Tensor) -> Tensor:
        v_B = lif.membrane(x_TB)
        noise_B = self._noise(v_B) if self.is_open and self.keys else None
        spikes = []
        for x_B in x_TB.unbind(0):
            s_B, v_B = self._step(lif, x_B.to(v_B.dtype), v_B, noise_B)
            v_B = lif.carry(v_B)
            spikes.append(s_B)
        lif.state.write("v", v_B)
        s_TB = torch.stack(spikes)
        if not self.is_open:
            return s_TB.to(x_TB.dtype)
        self.state.write("spikes", s_TB)
        if self.readout is not None:
            self.state.write("logits", self.readout.logits(s_TB.to(x_TB.dtype)))
        out_TB = s_TB.detach()
        return (out_TB if noise_B is None or self.inject == "membrane" else out_TB + noise_B).to(
            x_TB.dtype
        )

    def _noise(self, v_B: Tensor) -> Tensor:
        """alpha z `[B, ...]` of this step."""
        last_BN = self.state.read("z")
        if self.sign < 0 and last_BN is not None:
            z_BN = -last_BN
        else:
            z_BN = noise(
                self.keys, v_B[0].numel(), distribution=self.distribution, device=v_B.device
            ).to(v_B.dtype)
        self.state.write("z", z_BN)
        return self.scale * z_BN.view_as(v_B)

    def _step(
        self, lif: LIF, x_B: Tensor, v_B: Tensor, noise_B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if noise_B is None or self.inject == "spikes":
            return lif.step(x_B, v_B)
        s_B, v_B = lif.step(x_B + (noise_B / (1 - lif.decay) if lif.scale_input else noise_B), v_B)
        return s_B, v_B - (noise_B if lif.reset == "subtract" else noise_B * (1 - s_B.detach()))


def run_readouts(model: nn.Module) -> AbstractContextManager[None]:
    """Make each `Readout` under `model` compute its logits at every forward inside the block.

    Local learning does the same.
    """

    def answer(readout: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(readout, Readout)
        readout.logits(inputs[0])

    return hooked(
        module.register_forward_hook(answer)
        for module in model.modules()
        if isinstance(module, Readout)
    )


def inject_gradients(loss: Tensor, ends: Sequence[Tensor], signals: Sequence[Tensor]) -> Tensor:
    """A scalar with the value of `loss` and the gradients `signals` at `ends`."""
    # apply is untyped in torch 2.13
    return _InjectGradients.apply(loss.detach(), *ends, *signals)  # type: ignore[return-value]


class _InjectGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[len(tensors) // 2 :])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,), signals = grad_outputs, ctx.saved_tensors
        return (None, *(g.to(each.dtype) * each for each in signals), *[None] * len(signals))


def refuse_skip_connections(who: str, model: nn.Module, ends: Mapping[str, Tensor]) -> None:
    """Check that no gradient can pass around the neurons from one layer to another.

    Each parameter must lead to only one of `ends`, the spikes of each layer and the output. A skip
    connection, as in a residual network, carries the graph of lower layers to higher ones.

    Raises: ValueError that names the first parameter with paths to two ends.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    reached: dict[int, str] = {}
    for end, value in ends.items():
        leaves = _leaves(value)
        # In the model's order, so that repeated runs name the same parameter.
        for parameter in [*filter(leaves.__contains__, names), *leaves - names.keys()]:
            other = reached.setdefault(parameter, end)
            require(
                other == end,
                f"{who}: a stream that passes by the neurons would carry gradients between"
                f" layers; got {names.get(parameter, 'a tensor')} with a path to {other} and to"
                f" {end}",
            )


def _leaves(value: Tensor) -> set[int]:
    """The ids of the leaf tensors in the graph of `value`."""
    nodes, todo = set(), [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo.extend(after for after, _ in node.next_functions)
    return {id(node.variable) for node in nodes if hasattr(node, "variable")}
