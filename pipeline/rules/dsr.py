"""Differentiation on Spike Representation: a backward through firing rates instead of spikes."""

# T time, B batch, K classes

import copy
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts, refuse_unless_one_of, require
from pipeline.core.torch_settings import without_autocast
from pipeline.rules.base import OverTime, Rule, World
from pipeline.spiking.encode import is_static
from pipeline.spiking.neuron import named_neurons
from pipeline.spiking.norm import batch_norms
from pipeline.spiking.op_scope import op_scope
from pipeline.spiking.rate import RateNeuron, rate_weights
from pipeline.spiking.state import fresh_state, set_temporarily
from pipeline.spiking.trace import running_order

CALIBRATION_BATCH = 32
OUTLIER_DIVISOR = 1000  # the thresholds ignore the largest 1 / 1000 of the rates


class DSR(Rule):
    """The forward uses spikes. The backward differentiates the rates of `RateIF` and `RateLIF`.

        I = sum_t w[t] x[t],   r = clamp(gain I, 0, height),   G = sum_t dL/dout[t]
        dL/dx[t]     = w[t] gain G   where 0 <= gain I <= height, else 0
        dL/dheight   = sum of G      where gain I > height

    The names are those of `spiking/rate.py`. All modules between the neurons use plain autograd on
    T steps. The gradient is exactly that of a network of rates under two conditions: the loss uses
    the weighted mean of the logits (`WeightedRates`; for IF the plain mean), and the modules
    between the neurons are the same linear map at each step. Then dL/dout[t] is proportional to
    w[t] in every layer.

    Args:
        calibrate: the number of training batches that set all thresholds before the first step. The
            height is the 99.9th percentile of max(0, gain I) over samples and units, but at least
            bound / dt.
        calibrate_on: "spikes" calibrates layer by layer, with the spikes of the calibrated layers
            below and batch statistics in batch norm. "activations", as published, replaces each
            neuron by max(0, gain I), with running statistics in batch norm. Then the input is the
            image, or the mean frame of a recording.
        backward: "rates" are the equations above. "published" is the backward of the published code
            for LIF, see below.

    With gain' = 1 / tau, "published" is

        G = T sum_t w[t] dL/dout[t]
        dL/dx[t]     = gain' G / T   where 0 < gain' I < height, else 0
        dL/dheight   = sum of G      where gain' I > height

    It distributes G evenly over time, so a weight's gradient uses the plain mean of its inputs. The
    gradients of all layers are larger than with "rates" by one factor, T sum_t w[t]^2, which is
    1.02 to 1.5 for T dt / tau of 0.5 to 2.5. In addition, gain' is larger than gain in each layer
    (by a factor of 1.025 at dt = 0.05 tau). The published accuracies of LIF were reached with this
    backward. For IF both backwards are equal.

    Raises:
        ValueError: in `__init__`, a negative `calibrate`, an unknown choice, or "activations" with
            `calibrate` = 0. In `attach`, a model without rate-coded neurons or with other neurons,
            a model with only `RateIF` under "published", or `WeightedRates` with
            `over_time="steps"`.
    Source: Meng et al. 2022 (arXiv 2205.00459), section 4; calibration: Rathi et al. 2020 (arXiv
    2005.01807).
    """

    memory = "linear"
    over_time_choices = ("mean", "steps")

    def __init__(
        self,
        *,
        calibrate: int = 0,
        calibrate_on: Literal["spikes", "activations"] = "spikes",
        backward: Literal["rates", "published"] = "rates",
    ) -> None:
        super().__init__()
        refuse_unless_counts("DSR", {"calibrate": calibrate}, minimum=0)
        refuse_unless_one_of("DSR", ("spikes", "activations"), calibrate_on=calibrate_on)
        require(
            calibrate_on != "activations" or calibrate != 0,
            "DSR: calibrate must be >= 1 with calibrate_on='activations'; got calibrate=0",
        )
        refuse_unless_one_of("DSR", ("rates", "published"), backward=backward)
        self.calibration_batches = calibrate
        self.calibrate_on: Literal["spikes", "activations"] = calibrate_on
        self.backward: Literal["rates", "published"] = backward

    def attach(
        self, model: nn.Module, *, world: World = World(), over_time: OverTime = "steps"
    ) -> None:
        neurons = named_neurons(model)
        require(
            neurons,
            "DSR: the model must have rate-coded neurons, RateIF or RateLIF; got"
            f" {type(model).__name__}",
        )
        for name, neuron in neurons:
            require(
                isinstance(neuron, RateNeuron),
                f"DSR: every neuron must be a RateIF or RateLIF; got {type(neuron).__name__} at"
                f" {name or 'the model itself'}",
            )
        require(
            self.backward != "published" or not all(neuron.decay == 1 for _, neuron in neurons),
            "DSR: backward='published' has an effect only on RateLIF, so the model must have a"
            " RateLIF; got only RateIF",
        )
        super().attach(model, world=world, over_time=over_time)
        for _, neuron in neurons:
            is_published = self.backward == "published" and neuron.decay < 1
            self.set_seam(neuron, "custom_forward", partial(_rate_map, is_published=is_published))

    _loss_terms = Rule._one_loss_term

    @torch.no_grad()
    def calibrate(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        inputs = [x_TB for batch in batches for x_TB in batch.split(CALIBRATION_BATCH, dim=1)]
        samples = sum(x_TB.shape[1] for x_TB in inputs)
        # Only a copy of the model runs, so the model's modes, seams and running statistics do not
        # change. Batch norm uses the samples of this rank, because all ranks have the same batches.
        model_copy = copy.deepcopy(model).eval()
        if self.calibrate_on == "spikes":
            for norm in batch_norms(model_copy):
                norm.train()
                norm.between = "rank"
        else:
            inputs = [
                x_TB[:1] if is_static(x_TB) else x_TB.mean(0, keepdim=True) for x_TB in inputs
            ]
            for _, neuron in named_neurons(model_copy):
                neuron.custom_forward = (
                    lambda lif, x_TB: lif.gain * x_TB.clamp_min(0)  # type: ignore[operator]
                )
        neurons: dict[str, Any] = dict(named_neurons(model_copy))
        originals: dict[str, Any] = dict(named_neurons(model))
        with running_order(neurons) as order, fresh_state(model_copy):
            model_copy(inputs[0])
        for name in dict.fromkeys(order):
            neuron = neurons[name]
            rates = (_rate_of_neuron(neuron, model_copy, x_TB) for x_TB in inputs)
            threshold = neuron.dt * float(_percentile(rates, samples))
            for each in (neuron, originals[name]):
                each.threshold.fill_(max(threshold, neuron.bound))


def _rate_map(lif: RateNeuron, x_TB: Tensor, *, is_published: bool) -> Tensor:
    """The spikes of the neuron, with the derivative of its rate. Replaces the neuron's forward."""
    return _RateMap.apply(  # type: ignore[return-value]
        x_TB, lif.clamped_threshold(), lif, is_published
    )


class _RateMap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TB: Tensor, threshold: Tensor, lif: RateNeuron, is_published: bool
    ) -> Tensor:
        out_TB = lif.run_without_gradient(x_TB)
        gain = (
            -math.log(lif.decay) / lif.dt if is_published else lif.gain
        )  # -log(decay) / dt: 1 / tau
        rate_B = _unclamped_rate(lif, x_TB, gain)
        height = (threshold / lif.dt).to(rate_B.dtype)
        is_inside_B = (
            (rate_B > 0) & (rate_B < height) if is_published else (rate_B >= 0) & (rate_B <= height)
        )
        ctx.save_for_backward(is_inside_B, rate_B > height)
        ctx.decay, ctx.gain, ctx.dt, ctx.is_published = lif.decay, gain, lif.dt, is_published
        return out_TB

    @staticmethod
    def backward(
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        (g_TB,) = grad_outputs
        is_inside_B, is_above_B = ctx.saved_tensors
        weights_T = rate_weights(ctx.decay, g_TB)
        if ctx.is_published:
            g_B = len(g_TB) * torch.tensordot(weights_T, g_TB.to(weights_T.dtype), dims=1)
            weights_T = torch.full_like(weights_T, 1 / len(g_TB))
        else:
            g_B = g_TB.sum(0, dtype=weights_T.dtype)
        g_x_TB = g_threshold = None
        if ctx.needs_input_grad[0]:
            weights_T = weights_T.view(-1, *[1] * g_B.dim())
            g_x_TB = (weights_T * (ctx.gain * (is_inside_B * g_B))).to(g_TB.dtype)
        if ctx.needs_input_grad[1]:
            g_threshold = (is_above_B * g_B).sum().view(1) / ctx.dt
        return g_x_TB, g_threshold, None, None


def _unclamped_rate(lif: RateNeuron, x_TB: Tensor, gain: float) -> Tensor:
    """gain I of the input `x_TB`, at least in fp32."""
    weights_T = rate_weights(lif.decay, x_TB)
    with without_autocast(x_TB.device), op_scope("rates"):
        return gain * torch.tensordot(weights_T, x_TB.to(weights_T.dtype), dims=1)


# -------------------------------------------------------------------------------------- calibration


class _RateFound(Exception):
    """Stops a forward at the neuron to calibrate. Its argument is the rate."""


def _raise_rate(lif: RateNeuron, x_TB: Tensor) -> Tensor:
    raise _RateFound(_unclamped_rate(lif, x_TB, lif.gain))


def _rate_of_neuron(neuron: RateNeuron, model: nn.Module, x_TB: Tensor) -> Tensor:
    """gain I of `neuron`, `[B, ...]`, for the model's input `x_TB`."""
    try:
        with set_temporarily([neuron], "custom_forward", _raise_rate), fresh_state(model):
            model(x_TB)
    except _RateFound as found:
        return found.args[0]
    raise AssertionError("the neuron must run in each forward; got a forward without it")


def _percentile(rates: Iterator[Tensor], samples: int) -> Tensor:
    """The exact 99.9th percentile of max(0, rate). It stores only the largest 0.1 % of rates."""
    largest = torch.empty(0)
    for rate_B in rates:
        count = rate_B[0].numel() * samples // OUTLIER_DIVISOR + 1
        candidates = torch.cat([largest.to(rate_B), rate_B.flatten()])
        largest = candidates.topk(min(count, candidates.numel())).values
    return largest[-1].clamp_min(0)
