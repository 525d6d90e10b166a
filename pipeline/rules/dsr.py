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
from pipeline.rules.base import OverTime, Rule, World
from pipeline.spiking.encode import is_static
from pipeline.spiking.neuron import named_neurons
from pipeline.spiking.norm import batch_norms
from pipeline.spiking.op_scope import op_scope
from pipeline.spiking.rate import RateNeuron, rate_weights
from pipeline.spiking.state import attribute_set, fresh_state
from pipeline.spiking.trace import running_order

# Calibration processes this many samples at a time, and keeps the largest 1 / 1000 of the rates.
CALIBRATION_SAMPLES = 32
OUTLIERS = 1000


class DSR(Rule):
    """Spikes in the forward, the rate map of `spiking/rate.py` in the backward, for `RateIF` and
    `RateLIF`.

        I = sum_t w[t] x[t],   r = clamp(gain I, 0, height),   G = sum_t dL/dout[t]
        dL/dx[t]     = w[t] gain G   where 0 <= gain I <= height, else 0
        dL/dheight   = sum of G      where gain I > height

    Everything between two neurons is plain autograd on T steps. If the loss sees the weighted mean
    of the logits (`WeightedRates`; for IF the plain mean), G[t] is proportional to w[t] in every
    layer, and the gradient is exactly that of the network of rates.

    Args:
        calibrate: number of training batches from which all thresholds are set before the first
            step. The height is the 99.9th percentile of max(0, gain I) over samples and units.
        calibrate_on: "spikes": layer by layer, from the spikes of the calibrated layers below, with
            batch statistics in batch norm. "activations", as published: from the ANN with unbounded
            ramps in place of the neurons, with running statistics in batch norm. Its input is the
            image, or the mean frame of a recording.
        backward: "rates" are the equations above. "published" is the backward of the published code
            for LIF, see below.

    With gain' = 1 / tau, "published" is

        G = T sum_t w[t] dL/dout[t]
        dL/dx[t]     = gain' G / T   where 0 < gain' I < height, else 0
        dL/dheight   = sum of G      where gain' I > height

    It distributes G evenly over time, so a weight's gradient uses the plain mean of its inputs. A
    layer's gradient is larger than that of the rates by T sum_t w[t]^2 (1.02 to 1.5). Published LIF
    accuracies were reached with it. For IF both are equal.

    Raises: ValueError for a negative `calibrate`, an unknown choice, or `calibrate_on` without
    `calibrate` (when made); for a model without rate-coded neurons or with other neurons, or with
    IF alone under "published" (`attach`).
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
            "DSR: calibrate_on='activations' needs batches to calibrate on; got calibrate=0",
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
            "DSR: backward='published' changes RateLIF alone; got a model with RateIF alone",
        )
        super().attach(model, world=world, over_time=over_time)
        for _, neuron in neurons:
            evenly = self.backward == "published" and neuron.decay < 1
            self.set_seam(neuron, "gradient", partial(_rate_map, evenly=evenly))

    _loss_terms = Rule._one_loss_term

    @torch.no_grad()
    def calibrate(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        parts = [part_TB for x_TB in batches for part_TB in x_TB.split(CALIBRATION_SAMPLES, dim=1)]
        samples = sum(part_TB.shape[1] for part_TB in parts)
        # A copy runs, so the model's modes, seams and running statistics stay. Its batch norms use
        # this rank's samples, because every rank has the same batches.
        twin = copy.deepcopy(model).eval()
        if self.calibrate_on == "spikes":
            for norm in batch_norms(twin):
                norm.train()
                norm.between = "rank"
        else:
            parts = [
                part_TB[:1] if is_static(part_TB) else part_TB.mean(0, keepdim=True)
                for part_TB in parts
            ]
            for _, neuron in named_neurons(twin):
                neuron.gradient = (
                    lambda lif, x_TB: lif.gain * x_TB.clamp_min(0)  # type: ignore[operator]
                )
        neurons: dict[str, Any] = dict(named_neurons(twin))
        originals: dict[str, Any] = dict(named_neurons(model))
        with running_order(neurons) as ran, fresh_state(twin):
            twin(parts[0])
        for name in dict.fromkeys(ran):
            neuron = neurons[name]
            height = _percentile((_input_rate(neuron, twin, x_TB) for x_TB in parts), samples)
            for each in (neuron, originals[name]):
                each.threshold.fill_(max(neuron.dt * float(height), neuron.bound))


def _rate_map(lif: RateNeuron, x_TB: Tensor, *, evenly: bool) -> Tensor:
    """The seam `LIF.gradient`: the neuron's spikes, with the derivative of its rate."""
    return _RateMap.apply(x_TB, lif.clamped_threshold(), lif, evenly)  # type: ignore[return-value]


class _RateMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TB: Tensor, threshold: Tensor, lif: RateNeuron, evenly: bool) -> Tensor:
        v_B = lif.membrane(x_TB)
        out_TB = torch.empty_like(x_TB, memory_format=torch.contiguous_format)
        for t, x_B in enumerate(x_TB.unbind(0)):
            out_TB[t], v_B = lif.step(x_B.to(v_B.dtype), v_B)
        lif.state.write("v", v_B)
        gain = -math.log(lif.decay) / lif.dt if evenly else lif.gain  # 1 / tau
        rate_B = _rate(lif, x_TB, gain)
        height = (threshold / lif.dt).to(rate_B.dtype)
        inside_B = (
            (rate_B > 0) & (rate_B < height) if evenly else (rate_B >= 0) & (rate_B <= height)
        )
        ctx.save_for_backward(inside_B, rate_B > height)
        ctx.decay, ctx.gain, ctx.dt, ctx.evenly = lif.decay, gain, lif.dt, evenly
        return out_TB

    @staticmethod
    def backward(
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        (g_TB,) = grad_outputs
        inside_B, above_B = ctx.saved_tensors
        weights_T = rate_weights(ctx.decay, g_TB)
        if ctx.evenly:
            g_B = len(g_TB) * torch.tensordot(weights_T, g_TB.to(weights_T.dtype), dims=1)
            weights_T = torch.full_like(weights_T, 1 / len(g_TB))
        else:
            g_B = g_TB.sum(0, dtype=weights_T.dtype)
        g_x_TB = g_threshold = None
        if ctx.needs_input_grad[0]:
            weights_T = weights_T.view(-1, *[1] * g_B.dim())
            g_x_TB = (weights_T * (ctx.gain * (inside_B * g_B))).to(g_TB.dtype)
        if ctx.needs_input_grad[1]:
            g_threshold = (above_B * g_B).sum().view(1) / ctx.dt
        return g_x_TB, g_threshold, None, None


def _rate(lif: RateNeuron, x_TB: Tensor, gain: float) -> Tensor:
    """gain I of the input, at least in fp32."""
    weights_T = rate_weights(lif.decay, x_TB)
    with torch.autocast(x_TB.device.type, enabled=False), op_scope("rates"):
        return gain * torch.tensordot(weights_T, x_TB.to(weights_T.dtype), dims=1)


# -------------------------------------------------------------------------------------- calibration


class _Reached(Exception):
    """Ends a forward at the neuron whose rate is needed, and carries the rate."""


def _stop_here(lif: RateNeuron, x_TB: Tensor) -> Tensor:
    raise _Reached(_rate(lif, x_TB, lif.gain))


def _input_rate(neuron: RateNeuron, model: nn.Module, x_TB: Tensor) -> Tensor:
    """gain I of `neuron`, `[B, ...]`, given the outputs of the neurons before it."""
    try:
        with attribute_set([neuron], "gradient", _stop_here), fresh_state(model):
            model(x_TB)
    except _Reached as reached:
        return reached.args[0]
    raise AssertionError("a neuron that ran once runs again")


def _percentile(rates: Iterator[Tensor], samples: int) -> Tensor:
    """The exact 99.9th percentile of max(0, rate), with memory for the largest 0.1 % only."""
    largest = torch.empty(0)
    for rate_B in rates:
        keep = rate_B[0].numel() * samples // OUTLIERS + 1
        candidates = torch.cat([largest.to(rate_B), rate_B.flatten()])
        largest = candidates.topk(min(keep, candidates.numel())).values
    return largest[-1].clamp_min(0)
