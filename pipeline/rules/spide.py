"""SPIDE: the gradient at an equilibrium, solved by a second phase of spiking neurons."""

# T time, B batch, K classes, N layers; T_B steps of the backward phase

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.checks import refuse_unless_counts, require
from pipeline.rules.base import LossOf, LossTerm, OverTime, Rule, World, refuse_foreign_norms
from pipeline.spiking.equilibrium import Linearized, find_equilibrium
from pipeline.spiking.norm_limit import LimitedSynapse
from pipeline.spiking.state import hooked
from pipeline.spiking.synapse import Linear, effective_weight, error_weight

# Adds to a layer's potentials u_B, in place, the input from emissions s_B of the layer above.
Transposed = Callable[[Tensor, Tensor], None]


class SPIDE(Rule):
    """Spike-based implicit differentiation: solves IDE's equation in `steps` (T_B) backward steps.

        forward      T steps without a graph; a[T] is the rate at their end
                     (`spiking/equilibrium.py`)
        backward     beta = g + J^T beta, as mean emissions of ternary neurons (`ternary_phase`)
        grad W_l   = mean_b (mask_l beta_l / subtract_l) z_{l-1}^T,   one beta per layer

    The input of the backward phase is `scale` times the gradient g of each sample's own loss;
    afterwards the result is divided by `scale`. A neuron emits multiples of q = 2 threshold, so
    scale |beta| has the resolution q / T_B and must stay below q. With too small a scale no neuron
    fires; with too large a scale they saturate. The spikes depend on the sample alone, not on
    batch, micro-batches or ranks, and the gradient has the same size as under other rules. The
    published factor S multiplies a mean over 128 samples, so it is `scale` = S / 128 here.

    The published symmetric reset of the forward neurons, rest at -threshold, is `subtract` = 2
    threshold in the network. A `decay` below 1 makes the backward neurons leaky: they average over
    about their last 1 / (1 - decay) steps. Masks and z_l are those of f at a[T], as in IDE, so that
    SPIDE differs only in the solution of the equation. The published code takes them from each
    layer's simulated rate.

    Metrics of the last micro-batch: spikes per neuron and step in the forward and in the backward
    phase, and the share of saturated backward neurons. If no neuron fires, or most saturate, the
    rule warns once.

    Raises: ValueError for arguments out of range (when made); for a model without an `Equilibrium`,
    with several, with neurons outside it, or with a norm that mixes time steps (`attach`).
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
        self, model: nn.Module, x_TB: Tensor, loss_of: LossOf, step: int, rows: Sequence[int]
    ) -> Iterator[LossTerm]:
        spikes: list[float] = []
        places: list[int] = []

        def count(_: nn.Module, __: object, s_1B: Tensor) -> None:
            spikes.append(s_1B.count_nonzero().item())
            places.append(s_1B.numel())

        neurons = find_equilibrium(self.label, model).neurons
        with hooked(neuron.register_forward_hook(count) for neuron in neurons):
            for term in self._one_loss_term(model, x_TB, loss_of, step, rows):
                self.forward_rate = sum(spikes) / sum(places)
                self.adjoint.samples = x_TB.shape[1]
                assert term.backward is not None
                term.backward.register_hook(self.adjoint.record_factor)
                yield term


class _Adjoint:
    """The seam `Equilibrium.adjoint`. It holds no references to rule or model."""

    def __init__(self, steps: int, scale: float, threshold: float, decay: float) -> None:
        self.steps, self.scale, self.threshold, self.decay = steps, scale, threshold, decay
        self.samples, self.factor = 1, 1.0
        self.metrics = {"backward_rate": math.nan, "saturated": math.nan}
        self.warned: set[str] = set()

    def __call__(self, g_B: Tensor, vjp: Linearized) -> list[Tensor]:
        g_B = g_B.to(torch.promote_types(g_B.dtype, torch.float32))
        if self.factor == 0:  # a loss of weight 0 has no gradient
            return [torch.zeros_like(mask_B, dtype=g_B.dtype) for mask_B in vjp.masks]
        # g_B is the gradient of `factor` times a mean over `samples`.
        gain = self.scale * self.samples / self.factor
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
        largest = gain * g_B.abs().max().item()
        settings = (
            f"the largest gradient times scale is {largest:.2g} at scale={self.scale},"
            f" steps={self.steps}, threshold={self.threshold}"
        )
        if phase.rate == 0 and largest > 0:
            self._warn_once(
                "silent",
                "SPIDE: no backward neuron fired, so only the readout learnt from the batch:"
                f" {settings}; raise scale or steps",
            )
        if phase.saturated > 0.5:
            self._warn_once(
                "saturated",
                f"SPIDE: {phase.saturated:.0%} of the backward neurons saturated: {settings}; lower"
                " scale",
            )
        return [beta_B / gain for beta_B in phase.beta]

    def record_factor(self, g: Tensor) -> None:
        """The hook of the loss: record the factor that a backend gave it, before the solve."""
        self.factor = g.item()

    def _warn_once(self, cause: str, message: str) -> None:
        if cause not in self.warned:
            self.warned.add(cause)
            warnings.warn(message, RuntimeWarning, stacklevel=3)


@dataclass(frozen=True)
class Ternary:
    """The result of a backward phase.

    `beta` holds the mean emissions of each layer and `rate` the emissions per neuron and step.
    `saturated` is the share of the neurons whose potential ends above one emission; the quantum
    limits their beta.
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

    J^T is applied layer by layer from the last to the first, each with its own potentials. Within a
    step a layer receives the emissions that the layer above has just made; the last layer receives
    those of the first layer from the step before. g is the input of the last layer.

    With decay 1, the error is at most quantum ||(I - J^T)^-1||_inf / T_B while |beta| < quantum.
    The symmetric reset, quantum = 2 threshold (rest at -threshold), keeps potentials within
    +-threshold and has the smallest error.

    Args:
        transposed: `transposed[l]` maps the emissions of layer l to the layer below, those of layer
            0 to the last layer.
        shapes: of the layers' potentials.
    """
    last = len(shapes) - 1
    # |u| > below equals |u| >= threshold, and hardshrink computes the former in one operation.
    below = torch.nextafter(g_B.new_tensor(threshold), g_B.new_tensor(0.0)).item()
    potentials, emissions, sums, counts = (
        [g_B.new_zeros(shape) for shape in shapes] for _ in range(4)
    )
    for _ in range(steps):
        for layer in range(last, -1, -1):
            u_B, s_B, sum_B = potentials[layer], emissions[layer], sums[layer]
            if decay != 1:
                u_B.mul_(decay)
                sum_B.mul_(decay)
            behind = 0 if layer == last else layer + 1
            transposed[behind](u_B, emissions[behind])
            if layer == last:
                u_B.add_(g_B)
            torch.ops.aten.hardshrink.out(u_B, below, out=s_B)
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
    """Mask and divisor of a layer's neurons, then the transposed synapse into it."""
    gain_B, synapse = vjp.masks[layer] / vjp.divisors[layer], vjp.synapses[layer]
    is_limited = isinstance(synapse, LimitedSynapse)
    linear = synapse.synapse if is_limited else synapse
    has_values = gain_B.untyped_storage().device.type != "meta"  # fake tensors have none
    if isinstance(linear, Linear) and gain_B.device.type == "cpu" and has_values:
        weight = synapse.weight() if is_limited else effective_weight(linear)
        carrier = error_weight(weight, linear.backward_weight).detach()
        return _event_driven(carrier.to(gain_B.dtype), gain_B)

    def transposed(u_B: Tensor, s_B: Tensor) -> None:
        u_B.add_(vjp.transposed(layer, gain_B * s_B))

    return transposed


def _event_driven(weight: Tensor, gain_BM: Tensor) -> Transposed:
    """u += (gain s) W, as a sum of the rows of W whose neuron emitted (a few per cent).

    It takes a quarter of the time of the product at 128 samples, 400 neurons and 3 % (one core,
    torch 2.13). The order of a sample's sum, and so its bits, do not depend on the batch.
    """
    samples, neurons = gain_BM.shape
    rows_B = torch.arange(samples)

    def transposed(u_BN: Tensor, s_BM: Tensor) -> None:
        flat = (gain_BM * s_BM).flatten()
        places = flat.nonzero().squeeze(1)
        sample = places.div(neurons, rounding_mode="floor")
        starts_B = torch.searchsorted(sample, rows_B)
        u_BN.add_(
            F.embedding_bag(
                places - sample * neurons,
                weight,
                starts_B,
                mode="sum",
                per_sample_weights=flat[places],
            )
        )

    return transposed
