"""Local learning: layers that learn from a signal and pass no gradient to the layer below.

A rule sets a `LocalGradient` on each neuron. Then the neuron outputs its spikes, optionally with
noise, without a graph. It also records the spikes with a graph, which reaches back only to the
synapse before the neuron. `inject_gradients` returns a scalar with the value of the loss. The
scalar's gradient at the recorded spikes of each layer is the layer's signal g. The rule detaches
the membrane between time steps. psi is the derivative of the surrogate (`neuron.py`).

    noise on spikes     s[t] = LIF(x[t]),   out[t] = s[t] + alpha z[t]
    noise on membrane   s[t] = 1 if u[t] + alpha z[t] >= threshold,   out[t] = s[t]
    backward            dL/du[t] = psi(u[t] - threshold) g[t]
                        (with noise on the membrane: psi(u[t] + alpha z[t] - threshold) g[t])
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
from pipeline.spiking.state import State, temporary_hooks
from pipeline.spiking.synapse import Linear, apply_folded

Inject = Literal["spikes", "membrane"]


class Readout(nn.Module):
    """A linear readout of the preceding neuron, for rules that give hidden layers a local loss.

    Its forward is the identity. `logits` maps spikes `[T, B, C]` or `[T, B, C, H, W]` to logits
    `[T, B, K]`: it averages each channel of an image over a grid of `cells` x `cells` regions, and
    applies a linear layer.

    Raises: ValueError for numbers below 1, or in `logits` for spikes of another shape.
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
            s_TB.shape[2] == self.channels
            and (s_TB.dim() == 5 or (s_TB.dim() == 3 and self.cells == 1)),
            f"Readout: the spikes must have {self.channels} channels, and height and width if cells"
            f" > 1; got shape {tuple(s_TB.shape)} with cells={self.cells}",
        )
        if s_TB.dim() == 5:
            s_TB = apply_folded(
                lambda s_NCHW: F.adaptive_avg_pool2d(s_NCHW, self.cells), s_TB
            ).flatten(2)
        return self.linear(s_TB)

    def extra_repr(self) -> str:
        return f"{self.channels}, cells={self.cells}"


class LocalGradient:
    """Replaces the forward of one LIF. A rule sets it as the attribute `custom_forward` of the LIF.

    If `is_open`, the neuron runs as described at the head of the file. It records the `spikes` with
    the graph of its layer, the noise `z` if there is noise, and the `logits` of its `readout` if
    there is one. If `is_open` is False, it runs as the plain neuron, so evaluation has no noise.

    `scale` is alpha, in spikes or in units of the membrane. Noise on the membrane changes only the
    spike of its own step. A rule sets `keys_B` (None: no noise), and `sign`. With a
    negative sign, z is the negative of the last z in this batch, if there is one.
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
        self.keys_B: Tensor | None = None
        self.sign = 1.0

    def recorded(self, name: str) -> Tensor:
        """The recorded tensor `name` of the last call.

        `spikes` and `logits` are `[T, B, ...]` with a graph. `z` is `[B, N]`, after the sign. All
        steps of a call have the same z.

        Raises: ValueError if the neuron has not run.
        """
        value = self.state.read(name)
        require(
            value is not None,
            "LocalGradient: the network must run every neuron at every time step; got a neuron that"
            f" has no recorded {name}",
        )
        return value  # type: ignore[return-value]

    def __call__(self, lif: LIF, x_TB: Tensor) -> Tensor:
        v_B = lif.membrane(x_TB)
        noise_B = None
        if self.is_open and self.keys_B is not None:
            noise_B = self._noise(v_B, self.keys_B)
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
        if noise_B is not None and self.inject == "spikes":
            return (s_TB.detach() + noise_B).to(x_TB.dtype)
        return s_TB.detach().to(x_TB.dtype)

    def _noise(self, v_B: Tensor, keys_B: Tensor) -> Tensor:
        """alpha z of this call, in the shape of `v_B`."""
        last_z_BN = self.state.read("z")
        if self.sign < 0 and last_z_BN is not None:
            z_BN = -last_z_BN
        else:
            z_BN = noise(keys_B, v_B[0].numel(), distribution=self.distribution).to(v_B.dtype)
        self.state.write("z", z_BN)
        return self.scale * z_BN.view_as(v_B)

    def _step(
        self, lif: LIF, x_B: Tensor, v_B: Tensor, noise_B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One step of the neuron, with noise on the membrane if there is noise for it."""
        if noise_B is None or self.inject == "spikes":
            return lif.step(x_B, v_B)
        # Noise on the current is noise on u.
        s_B, v_B = lif.step(x_B + (noise_B / (1 - lif.decay) if lif.scale_input else noise_B), v_B)
        # The noise must not remain in v. A reset to zero has already removed it where s = 1.
        return s_B, v_B - (noise_B if lif.reset == "subtract" else noise_B * (1 - s_B.detach()))


def run_readouts(model: nn.Module) -> AbstractContextManager[None]:
    """Make each `Readout` of `model` also compute its logits, at every forward inside the block.

    So a recorder of the inputs of `Readout.linear` gets the same inputs as in local learning.
    """

    def compute_logits(readout: Any, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        readout.logits(inputs[0])

    return temporary_hooks(
        module.register_forward_hook(compute_logits)
        for module in model.modules()
        if isinstance(module, Readout)
    )


def inject_gradients(loss: Tensor, outputs: Sequence[Tensor], signals: Sequence[Tensor]) -> Tensor:
    """A scalar with the value of `loss`, and the gradient `signals[i]` at `outputs[i]`."""
    # apply is untyped in torch 2.13
    return _InjectGradients.apply(loss.detach(), *outputs, *signals)  # type: ignore[return-value]


class _InjectGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *outputs_and_signals: Tensor) -> Tensor:
        ctx.save_for_backward(*outputs_and_signals[len(outputs_and_signals) // 2 :])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [grad_outputs[0].to(each.dtype) * each for each in ctx.saved_tensors]
        return (None, *gradients, *[None] * len(gradients))


def refuse_skip_connections(
    error_prefix: str, model: nn.Module, outputs: Mapping[str, Tensor]
) -> None:
    """Check that no gradient can pass around the neurons from one layer to another.

    `outputs` are the recorded spikes of each layer and the output of the model, by name. Each
    parameter must be in the graph of only one of them. A skip connection, as in a residual network,
    would put the parameters of lower layers into the graphs of higher layers.

    Raises: ValueError, which starts with `error_prefix` and names the first parameter in two
    graphs.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    output_of_leaf: dict[int, str] = {}
    for output, value in outputs.items():
        leaves = _leaf_ids(value)
        # In the model's order, so that repeated runs name the same parameter.
        for leaf in [*filter(leaves.__contains__, names), *leaves - names.keys()]:
            other = output_of_leaf.setdefault(leaf, output)
            require(
                other == output,
                f"{error_prefix}: the model must not have skip connections around the neurons,"
                " because they would pass gradients between layers; got"
                f" {names.get(leaf, 'a tensor')} with a path to {other} and to {output}",
            )


def _leaf_ids(value: Tensor) -> set[int]:
    visited, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in visited:
            visited.add(node)
            stack.extend(next_node for next_node, _ in node.next_functions)
    return {id(node.variable) for node in visited if hasattr(node, "variable")}
