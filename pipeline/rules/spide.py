"""SPIDE: the gradient at an equilibrium, solved by a second phase of spiking neurons."""

# T time, B batch, K classes, T_B steps of the backward phase, N and M neurons of two layers

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.checks import refuse_unless_counts, require
from pipeline.rules.base import LossFn, LossTerm, OverTime, Rule, World, refuse_foreign_norms
from pipeline.spiking.equilibrium import Linearized, find_equilibrium
from pipeline.spiking.norm_limit import LimitedSynapse
from pipeline.spiking.state import temporary_hooks
from pipeline.spiking.synapse import Linear, effective_weight, error_weight

# (u_B, s_B) -> None: adds J^T s_B, the input from the emissions s_B of another layer, to the
# potentials u_B of a layer, in place.
Transposed = Callable[[Tensor, Tensor], None]


class SPIDE(Rule):
    """Spike-based implicit differentiation: solves the equation of IDE with spiking neurons.

        forward      T steps without a graph, which give the rate a[T] (`spiking/equilibrium.py`)
        backward     beta = g + J^T beta, as mean emissions of ternary neurons in T_B steps
                     (`ternary_phase`)
        grad W_l   = mean_b (mask_l beta_l / subtract_l) z_{l-1}^T,   one beta per layer

    The input of the backward phase is `scale` times the gradient g of each sample's own loss. The
    resulting beta is divided by `scale`, so the gradient has the same size as under other rules.
    The spikes depend only on the sample, not on the batch, micro-batches or ranks. The published
    factor S multiplies the mean loss of 128 samples, so here `scale` = S / 128.

    The emissions are -q, 0 or q with q = 2 threshold. So scale |beta| has the resolution q / T_B,
    and must be below q. If `scale` is too small, no neuron fires. If it is too large, the neurons
    saturate.

    The published symmetric reset of the forward neurons, with rest at -threshold, is `subtract` = 2
    threshold in the network. Masks and z_l are taken from f at a[T], as in IDE, so SPIDE differs
    from IDE only in the solver. The published code takes them from the simulated rate of each
    layer.

    The metrics of the last micro-batch are the spikes per neuron and step in the forward and in the
    backward phase, and the share of saturated backward neurons. The rule warns once if no backward
    neuron fires although g is not 0, and once if more than half of these neurons saturate.

    Args:
        steps: T_B, the number of time steps of the backward phase.
        scale: the factor of the gradient in the backward phase, see above.
        threshold: the threshold of the backward neurons, in units of their current.
        decay: the decay of the backward neurons. Below 1 they are leaky, and beta averages their
            emissions over about the last 1 / (1 - decay) steps.

    Raises: ValueError for arguments out of range (`__init__`); for over_time="steps", a model
    without an `Equilibrium`, with several, with neurons outside it, or with a norm that mixes time
    steps (`attach`).
    Source: Xiao et al. 2023 (arXiv 2302.00232, doi 10.1016/j.neunet.2023.01.026).
    """

    memory: Literal["constant", "linear"] = "constant"
    over_time_choices: tuple[OverTime, ...] = ("mean",)
    tiny: Mapping[str, Any] = {"steps": 4}
    forecast_note = "with dense products, also where a CPU skips neurons that did not fire"

    def __init__(
        self, steps: int = 100, *, scale: float = 1.0, threshold: float = 0.5, decay: float = 1.0
    ) -> None:
        super().__init__()
        refuse_unless_counts("SPIDE", {"steps": steps})
        require(0 < scale < math.inf, f"SPIDE: scale must be > 0 and finite; got scale={scale}")
        require(threshold > 0, f"SPIDE: threshold must be > 0; got threshold={threshold}")
        require(0 < decay <= 1, f"SPIDE: decay must be > 0 and at most 1; got decay={decay}")
        self.adjoint = _Adjoint(steps, scale, threshold, decay)
        self.forward_rate = math.nan

    def attach(
        self, model: nn.Module, *, world: World = World(), over_time: OverTime = "steps"
    ) -> None:
        equilibrium = find_equilibrium(self.label, model)
        refuse_foreign_norms(self.label, model)
        super().attach(model, world=world, over_time=over_time)
        self.set_seam(equilibrium, "adjoint", self.adjoint)

    def metrics(self) -> dict[str, float]:
        return {"forward_rate": self.forward_rate, **self.adjoint.metrics}

    def _loss_terms(
        self, model: nn.Module, x_TB: Tensor, loss_fn: LossFn, step: int, rows: Sequence[int]
    ) -> Iterator[LossTerm]:
        spikes: list[float] = []
        neuron_steps: list[int] = []

        def count(_: nn.Module, __: object, s_1B: Tensor) -> None:
            spikes.append(s_1B.count_nonzero().item())
            neuron_steps.append(s_1B.numel())

        equilibrium = find_equilibrium(self.label, model)
        with temporary_hooks(neuron.register_forward_hook(count) for neuron in equilibrium.neurons):
            for term in self._one_loss_term(model, x_TB, loss_fn, step, rows):
                self.forward_rate = sum(spikes) / sum(neuron_steps)
                self.adjoint.samples = x_TB.shape[1]
                assert term.backward is not None
                term.backward.register_hook(self.adjoint.record_loss_factor)
                yield term


class _Adjoint:
    """The seam `Equilibrium.adjoint`. It has no references to rule or model.

    `samples` and `loss_factor` are those of the current micro-batch: its loss is the mean over
    `samples`, and the backward of a backend multiplies this loss by `loss_factor`.
    """

    def __init__(self, steps: int, scale: float, threshold: float, decay: float) -> None:
        self.steps, self.scale, self.threshold, self.decay = steps, scale, threshold, decay
        self.samples, self.loss_factor = 1, 1.0
        self.metrics = {"backward_rate": math.nan, "saturated": math.nan}
        self.reported_problems: set[str] = set()

    def __call__(self, g_B: Tensor, vjp: Linearized) -> list[Tensor]:
        g_B = g_B.to(torch.promote_types(g_B.dtype, torch.float32))
        if self.loss_factor == 0:  # the gradient is 0
            return [torch.zeros_like(mask_B, dtype=g_B.dtype) for mask_B in vjp.masks]
        # gain * g_B is `scale` times the gradient of each sample's own loss.
        gain = self.scale * self.samples / self.loss_factor
        phase = ternary_phase(
            gain * g_B,
            [_transposed_layer(vjp, layer) for layer in range(len(vjp.masks))],
            [mask_B.shape for mask_B in vjp.masks],
            steps=self.steps,
            threshold=self.threshold,
            quantum=2 * self.threshold,
            decay=self.decay,
        )
        self.metrics = {"backward_rate": phase.rate, "saturated": phase.saturated}
        max_input = gain * g_B.abs().max().item()
        settings = (
            f"got a maximum of {max_input:.2g} for the gradient times scale, with"
            f" scale={self.scale}, steps={self.steps}, threshold={self.threshold}"
        )
        if phase.rate == 0 and max_input > 0:
            self._warn_once(
                "silent",
                "SPIDE: no backward neuron fired, so the batch trained only the readout;"
                f" {settings}; increase scale or steps",
            )
        if phase.saturated > 0.5:
            self._warn_once(
                "saturated",
                f"SPIDE: {phase.saturated:.0%} of the backward neurons saturated; {settings};"
                " decrease scale",
            )
        return [beta_B / gain for beta_B in phase.beta]

    def record_loss_factor(self, g: Tensor) -> None:
        """A hook of the loss, which runs before the solve. The gradient `g` is the factor."""
        self.loss_factor = g.item()

    def _warn_once(self, problem: str, message: str) -> None:
        if problem not in self.reported_problems:
            self.reported_problems.add(problem)
            warnings.warn(message, RuntimeWarning, stacklevel=3)


@dataclass(frozen=True)
class Ternary:
    """The result of a backward phase.

    `beta` is the mean emission of the neurons of each layer. `rate` is the number of emissions per
    neuron and step. `saturated` is the share of neurons with a final |u| above the quantum; the
    |beta| of these neurons is too small.
    """

    beta: list[Tensor]
    rate: float
    saturated: float


@torch.no_grad()
def ternary_phase(
    g_B: Tensor,
    transposed: Sequence[Transposed],
    shapes: Sequence[torch.Size],
    *,
    steps: int,
    threshold: float,
    quantum: float,
    decay: float = 1.0,
) -> Ternary:
    """Solve beta = g + J^T beta with neurons that emit +quantum, 0 or -quantum.

        u[t] = decay u[t-1] + J^T s[t-1] + g
        s[t] = quantum sign(u[t]) if |u[t]| >= threshold else 0,   then u[t] -= s[t]
        beta = sum_t decay^(T_B-t) s[t] / sum_t decay^(T_B-t)

    Each layer has its own potentials, and J^T is applied layer by layer from the last to the first.
    A layer receives the emissions of the layer above from the same step. The last layer receives g,
    and the emissions of the first layer from the previous step.

    With decay 1, the error is at most quantum ||(I - J^T)^-1||_inf / T_B while |beta| < quantum.
    The symmetric reset, quantum = 2 threshold (rest at -threshold), keeps the potentials within
    +-threshold and has the smallest error.

    Args:
        transposed: `transposed[l]` adds the input from the emissions of layer l to the potentials
            of the layer below, or of the last layer for l = 0.
        shapes: the shapes of the layers' potentials.
        quantum: the size of an emission.
    """
    last = len(shapes) - 1
    # hardshrink keeps u where |u| > limit. This condition is the same as |u| >= threshold.
    limit = torch.nextafter(g_B.new_tensor(threshold), g_B.new_tensor(0.0)).item()
    potentials, emissions, sums, counts = (
        [g_B.new_zeros(shape) for shape in shapes] for _ in range(4)
    )
    for _ in range(steps):
        for layer in range(last, -1, -1):
            u_B, s_B, sum_B = potentials[layer], emissions[layer], sums[layer]
            if decay != 1:
                u_B.mul_(decay)
                sum_B.mul_(decay)
            source = 0 if layer == last else layer + 1
            transposed[source](u_B, emissions[source])
            if layer == last:
                u_B.add_(g_B)
            torch.ops.aten.hardshrink.out(u_B, limit, out=s_B)
            s_B.sign_()
            counts[layer].addcmul_(s_B, s_B)
            s_B.mul_(quantum)
            u_B.sub_(s_B)
            sum_B.add_(s_B)
    weight = float(steps) if decay == 1 else (1 - decay**steps) / (1 - decay)
    neurons = sum(u_B.numel() for u_B in potentials)
    return Ternary(
        beta=[sum_B / weight for sum_B in sums],
        rate=sum(count_B.sum().item() for count_B in counts) / (steps * neurons),
        saturated=sum((u_B.abs() > quantum).sum().item() for u_B in potentials) / neurons,
    )


def _transposed_layer(vjp: Linearized, layer: int) -> Transposed:
    """J^T of one layer: mask / divisor of its neurons, then its input synapse, transposed."""
    gain_B, synapse = vjp.masks[layer] / vjp.divisors[layer], vjp.synapses[layer]
    is_limited = isinstance(synapse, LimitedSynapse)
    linear = synapse.synapse if is_limited else synapse
    has_values = gain_B.untyped_storage().device.type != "meta"  # fake tensors have none
    if isinstance(linear, Linear) and gain_B.device.type == "cpu" and has_values:
        weight = synapse.weight() if is_limited else effective_weight(linear)
        backward_weight = error_weight(weight, linear.backward_weight).detach()
        return _event_driven(backward_weight.to(gain_B.dtype), gain_B)

    def transposed(u_B: Tensor, s_B: Tensor) -> None:
        u_B.add_(vjp.transposed(layer, gain_B * s_B))

    return transposed


def _event_driven(weight: Tensor, gain_BM: Tensor) -> Transposed:
    """u += (gain s) W, as a sum of the rows of W whose neurons have emitted (a few per cent).

    With 128 samples, 400 neurons and 3 % emissions the sum takes a quarter of the time of the
    matrix product (one core, torch 2.13). The order of a sample's sum does not depend on the batch,
    so the result is bit-equal for any batch.
    """
    samples, neurons = gain_BM.shape
    sample_B = torch.arange(samples)

    def transposed(u_BN: Tensor, s_BM: Tensor) -> None:
        values = (gain_BM * s_BM).flatten()
        indices = values.nonzero().squeeze(1)
        samples_of_indices = indices.div(neurons, rounding_mode="floor")
        u_BN.add_(
            F.embedding_bag(
                indices - samples_of_indices * neurons,
                weight,
                torch.searchsorted(samples_of_indices, sample_B),
                mode="sum",
                per_sample_weights=values[indices],
            )
        )

    return transposed
