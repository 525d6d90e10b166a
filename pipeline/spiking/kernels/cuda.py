"""The neuron's kernels on an NVIDIA GPU: Triton, one program for each block of neurons.

A program runs all time steps of its neurons with the membrane in registers, so each value is read
and written once. The backward reads u, or computes u[t] for each t from the inputs up to t, which
are in the cache.

Offsets have 64 bits, because T times the neurons may exceed 2^31.
"""

# T time, B batch

# pyright: reportInvalidTypeForm=false
# Triton reads the annotations of a kernel.

import math
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton import language as tl

from pipeline.spiking.kernels.operators import new_step, new_steps, time_stride

_jit: Any = triton.jit  # its types are of what is compiled
BLOCK = 1024
PROGRAMS = 1024  # fill a large GPU


@_jit
def _charge(v, x, decay, weight, inverse_beta, CHARGE: tl.constexpr, SCALES: tl.constexpr):
    """u from the membrane and the input, which is scaled in its own dtype, as in eager."""
    current = x.to(tl.float32)
    if SCALES:
        current = (current * inverse_beta).to(x.dtype).to(tl.float32)
    if CHARGE == 0:
        return tl.fma(v, decay, current)
    elif CHARGE == 1:
        return tl.fma(v, decay, weight * current)
    else:  # as torch.lerp
        nearer = tl.where(decay < 0.5, current, v)
        return tl.fma(v - current, tl.where(decay < 0.5, decay, decay - 1.0), nearer)


@_jit
def _reset(u, threshold, margin, subtract, TO_ZERO: tl.constexpr):
    fires = u - threshold >= margin
    return tl.where(fires, 0.0 if TO_ZERO else u - subtract, u)


@_jit
def _derivative(distance, a, b, SURROGATE: tl.constexpr):
    """The surrogate's derivative; a, b and SURROGATE are those of `surrogate_constants`."""
    if SURROGATE == 0:
        return tl.maximum(a - b * tl.abs(distance), 0.0)
    elif SURROGATE == 1:
        e = tl.exp(-tl.abs(a * distance))
        return a * e / ((1.0 + e) * (1.0 + e))
    elif SURROGATE == 2:
        return tl.where(tl.abs(distance) <= a, b, 0.0)
    elif SURROGATE == 3:
        z = a * distance
        return b / (1.0 + z * z)
    else:
        z = 1.0 + tl.abs(a * distance)
        return 1.0 / (z * z)


@_jit
def _forward(
    x, v0, learnt_decay, levels, s, v_end, u, neurons: tl.int64, x_step: tl.int64, decay, weight,
    threshold, margin, subtract, gain, inverse_beta, STEPS: tl.constexpr, CHARGE: tl.constexpr,
    TO_ZERO: tl.constexpr, HAS_V: tl.constexpr, LEARNT: tl.constexpr, LEVELS: tl.constexpr,
    SCALES: tl.constexpr, SAVES_U: tl.constexpr, NEEDS_END: tl.constexpr,
    RESETS_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < neurons
    if LEARNT:
        decay = tl.load(learnt_decay).to(tl.float32)
    if LEVELS:
        threshold = tl.load(levels)
        subtract = tl.load(levels + 1)
        gain = tl.load(levels + 2)
    v = tl.load(v0 + i, mask, 0.0) if HAS_V else tl.zeros((BLOCK,), tl.float32)
    if RESETS_FIRST:
        v = _reset(v, threshold, margin, subtract, TO_ZERO)
    for t in range(STEPS):
        x_t = tl.load(x + t * x_step + i, mask, 0.0)
        v = _charge(v, x_t, decay, weight, inverse_beta, CHARGE, SCALES)
        if SAVES_U:
            tl.store(u + t * neurons + i, v, mask)
        spikes = tl.where(v - threshold >= margin, gain, 0.0)
        tl.store(s + t * neurons + i, spikes.to(s.dtype.element_ty), mask)
        v = _reset(v, threshold, margin, subtract, TO_ZERO)
    if NEEDS_END:
        tl.store(v_end + i, v, mask)


@_jit
def _backward(
    u, x, v0, learnt_decay, g_s, g_v_end, g_x, g_v0, g_decay, neurons: tl.int64, x_step: tl.int64,
    g_s_step: tl.int64, decay, weight, threshold, margin, subtract, gain, inverse_beta, a, b,
    STEPS: tl.constexpr, CHARGE: tl.constexpr, TO_ZERO: tl.constexpr, HAS_U: tl.constexpr,
    HAS_V: tl.constexpr, LEARNT: tl.constexpr, SCALES: tl.constexpr, HAS_G_S: tl.constexpr,
    HAS_G_V: tl.constexpr, NEEDS_V: tl.constexpr, SURROGATE: tl.constexpr,
    RESET_GRADIENT: tl.constexpr, CUT: tl.constexpr, RESETS_FIRST: tl.constexpr,
    SUMS_STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < neurons
    if LEARNT:
        decay = tl.load(learnt_decay).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    sum_of_steps = tl.zeros((BLOCK,), tl.float32)
    g_v = tl.load(g_v_end + i, mask, 0.0) if HAS_G_V else tl.zeros((BLOCK,), tl.float32)
    first = tl.load(v0 + i, mask, 0.0) if HAS_V else tl.zeros((BLOCK,), tl.float32)
    if RESETS_FIRST:
        first = _reset(first, threshold, margin, subtract, TO_ZERO)
    for back in range(STEPS):
        t = STEPS - 1 - back
        v = first  # v[t-1]
        if HAS_U:
            u_t = tl.load(u + t * neurons + i, mask, 0.0)
            if LEARNT and t > 0:
                before = tl.load(u + (t - 1) * neurons + i, mask, 0.0)
                v = _reset(before, threshold, margin, subtract, TO_ZERO)
        else:
            for k in range(t):
                x_k = tl.load(x + k * x_step + i, mask, 0.0)
                u_k = _charge(v, x_k, decay, weight, inverse_beta, CHARGE, SCALES)
                v = _reset(u_k, threshold, margin, subtract, TO_ZERO)
            x_t = tl.load(x + t * x_step + i, mask, 0.0)
            u_t = _charge(v, x_t, decay, weight, inverse_beta, CHARGE, SCALES)
        distance = u_t - threshold
        g = tl.zeros((BLOCK,), tl.float32)
        if HAS_G_S:
            g_s_t = tl.load(g_s + t * g_s_step + i, mask, 0.0)
            g = (g_s_t.to(tl.float32) * gain).to(g_s_t.dtype).to(tl.float32)
        if RESET_GRADIENT:
            g -= g_v * (u_t if TO_ZERO else subtract)
        g = g * _derivative(distance, a, b, SURROGATE)
        g += tl.where(distance >= margin, 0.0, g_v) if TO_ZERO else g_v
        if LEARNT:
            if CHARGE == 2:
                x_t = tl.load(x + t * x_step + i, mask, 0.0)
                v -= (x_t.to(tl.float32) * inverse_beta).to(x_t.dtype).to(tl.float32)
            total += g * v
        current = g
        if CHARGE == 1:
            current = g * weight
        elif CHARGE == 2:
            current = g * (1.0 - decay)
        if SCALES:
            current = current.to(g_x.dtype.element_ty).to(tl.float32) * inverse_beta
        if SUMS_STEPS:
            sum_of_steps += current
        else:
            tl.store(g_x + t * neurons + i, current.to(g_x.dtype.element_ty), mask)
        g_v = g * decay
        if NEEDS_V and t == 0:
            tl.store(g_v0 + i, g_v, mask)
        if CUT:
            g_v = tl.zeros((BLOCK,), tl.float32)
    if SUMS_STEPS:
        tl.store(g_x + i, sum_of_steps.to(g_x.dtype.element_ty), mask)
    if LEARNT:
        tl.store(g_decay + tl.program_id(0), tl.sum(tl.where(mask, total, 0.0), 0))


def lif_forward(
    x_TB: Tensor,
    v_B: Tensor | None,
    learnt_decay: Tensor | None,
    levels: Tensor | None,
    end_B: Tensor | None,
    charge: int,
    decay: float,
    threshold: float,
    margin: float,
    subtract: float | None,
    gain: float,
    beta: float,
    resets_first: bool,
    saves_u: bool,
    needs_end: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The forward of `neuron.py`."""
    steps, neurons = len(x_TB), math.prod(x_TB.shape[1:])
    s_TB = new_steps(x_TB, x_TB.dtype)
    v_end_B = new_step(x_TB, torch.float32) if needs_end else None
    written_B = v_end_B if end_B is None else end_B
    u_TB = new_steps(x_TB, torch.float32) if saves_u else None
    _forward[_grid(neurons)](
        x_TB, v_B, learnt_decay, levels, s_TB, written_B, u_TB, neurons, time_stride(x_TB),
        *_numbers(decay, threshold, margin, subtract, gain, beta),
        STEPS=steps, CHARGE=charge, TO_ZERO=subtract is None and levels is None,
        HAS_V=v_B is not None, LEARNT=learnt_decay is not None, LEVELS=levels is not None,
        SCALES=beta != 1, SAVES_U=saves_u, NEEDS_END=written_B is not None,
        RESETS_FIRST=resets_first, BLOCK=BLOCK,
        enable_fp_fusion=False,  # each product is rounded, but for those of tl.fma
    )  # fmt: skip
    return s_TB, v_end_B, u_TB


def lif_backward(
    u_TB: Tensor | None,
    x_TB: Tensor | None,
    v_B: Tensor | None,
    learnt_decay: Tensor | None,
    g_s_TB: Tensor | None,
    g_v_B: Tensor | None,
    dtype: torch.dtype,
    charge: int,
    decay: float,
    threshold: float,
    margin: float,
    subtract: float | None,
    gain: float,
    beta: float,
    resets_first: bool,
    surrogate: int,
    a: float,
    b: float,
    reset_gradient: bool,
    cut: bool,
    needs_v: bool,
    sums_steps: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The backward of `neuron.py`."""
    like = x_TB if u_TB is None else u_TB
    assert like is not None
    steps, neurons = len(like), math.prod(like.shape[1:])
    g_x_TB = new_steps(like[:1] if sums_steps else like, dtype)
    g_v0_B = new_step(like, torch.float32) if needs_v else None
    sums = None
    if learnt_decay is not None:
        sums = torch.empty(_grid(neurons), dtype=torch.float32, device=like.device)
    _backward[_grid(neurons)](
        u_TB, x_TB, v_B, learnt_decay, g_s_TB, g_v_B, g_x_TB, g_v0_B, sums, neurons,
        time_stride(x_TB), time_stride(g_s_TB),
        *_numbers(decay, threshold, margin, subtract, gain, beta), a, b,
        STEPS=steps, CHARGE=charge, TO_ZERO=subtract is None, HAS_U=u_TB is not None,
        HAS_V=v_B is not None, LEARNT=learnt_decay is not None, SCALES=beta != 1,
        HAS_G_S=g_s_TB is not None, HAS_G_V=g_v_B is not None, NEEDS_V=needs_v,
        SURROGATE=surrogate, RESET_GRADIENT=reset_gradient, CUT=cut, RESETS_FIRST=resets_first,
        SUMS_STEPS=sums_steps, BLOCK=BLOCK,
        enable_fp_fusion=False,
    )  # fmt: skip
    g_decay = None
    if sums is not None and learnt_decay is not None:
        g_decay = sums.sum().view(1).to(learnt_decay.dtype)
    return g_x_TB, g_v0_B, g_decay


@cache
def _numbers(
    decay: float,
    threshold: float,
    margin: float,
    subtract: float | None,
    gain: float,
    beta: float,
) -> tuple[float, ...]:
    """The arguments from `decay` to `inverse_beta`, in fp32; Triton gives integers another type."""
    inverse_beta = np.float32(1) / np.float32(beta)  # by which torch multiplies on a GPU
    numbers = (decay, 1 - decay, threshold, margin, subtract or 0, gain, inverse_beta)
    return tuple(float(np.float32(number)) for number in numbers)


def _grid(neurons: int) -> tuple[int]:
    return (-(-neurons // BLOCK),)


@_jit
def _scaled_add(x, b, gain, y, alpha, size, x_step, b_step, BLOCK: tl.constexpr):
    """Of one time step, whose number is the second of the program."""
    t = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    x_i = tl.load(x + t * x_step + i, mask, 0.0).to(tl.float32)
    b_i = tl.load(b + t * b_step + i, mask, 0.0).to(tl.float32)
    y_i = tl.fma(b_i, alpha * tl.load(gain).to(tl.float32), x_i)
    tl.store(y + t * size + i, y_i.to(y.dtype.element_ty), mask)


@_jit
def _scaled_add_backward(g, b, gain, g_b, sums, alpha, size, g_step, b_step, BLOCK: tl.constexpr):
    t = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    g_i = tl.load(g + t * g_step + i, mask, 0.0).to(tl.float32)
    b_i = tl.load(b + t * b_step + i, mask, 0.0).to(tl.float32)
    g_b_i = g_i * (alpha * tl.load(gain).to(tl.float32))
    tl.store(g_b + t * size + i, g_b_i.to(g_b.dtype.element_ty), mask)
    tl.store(sums + t * tl.num_programs(0) + tl.program_id(0), tl.sum(g_i * b_i, 0))


def scaled_add_forward(x_TB: Tensor, b_TB: Tensor, gain: Tensor, alpha: float) -> Tensor:
    """The forward of `scaled_add.py`."""
    y_TB, size = new_steps(b_TB, b_TB.dtype), math.prod(b_TB.shape[1:])
    _scaled_add[(*_grid(size), len(b_TB))](
        x_TB,
        b_TB,
        gain,
        y_TB,
        float(alpha),
        size,
        time_stride(x_TB),
        time_stride(b_TB),
        BLOCK=BLOCK,
    )
    return y_TB


def scaled_add_backward(
    g_TB: Tensor, b_TB: Tensor, gain: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """The backward of `scaled_add.py`."""
    g_b_TB, size = new_steps(b_TB, b_TB.dtype), math.prod(b_TB.shape[1:])
    grid = (*_grid(size), len(b_TB))
    sums = torch.empty(grid, dtype=torch.float32, device=b_TB.device)
    _scaled_add_backward[grid](
        g_TB,
        b_TB,
        gain,
        g_b_TB,
        sums,
        float(alpha),
        size,
        time_stride(g_TB),
        time_stride(b_TB),
        BLOCK=BLOCK,
    )
    return g_b_TB, sums.sum(dtype=gain.dtype).mul_(alpha).view(1)


@_jit
def _norm_sums(
    x, g, mean_TC, sums, rows, pixels, channels, x_step, g_step, b_step, c_step, p_step,
    BACKWARD: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """For one time step, a block of channels and a part of the rows: the sums of x - shift and of
    its square; in the backward of g and of g (x - mean).

    The shift is the first value of a channel, so that the squares stay small.
    """
    t = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = c < channels
    at_channel = c.to(tl.int64) * c_step
    if BACKWARD:
        shift = tl.load(mean_TC + t * channels + c, is_channel, 0.0)
    else:
        shift = tl.load(x + t * x_step + at_channel, is_channel, 0.0).to(tl.float32)
    first = tl.zeros((ROWS, CHANNELS), tl.float32)
    second = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(tl.program_id(2) * ROWS, rows, tl.num_programs(2) * ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < rows)[:, None] & is_channel[None, :]
        at_row = (row // pixels) * b_step + (row % pixels) * p_step
        at = at_row[:, None] + at_channel[None, :]
        x_RC = tl.load(x + t * x_step + at, mask, 0.0).to(tl.float32)
        centred = tl.where(mask, x_RC - shift[None, :], 0.0)
        factor = centred
        if BACKWARD:
            factor = tl.load(g + t * g_step + at, mask, 0.0).to(tl.float32)
        first += factor
        second += factor * centred
    out = sums + ((tl.program_id(2) * tl.num_programs(1) + t) * 2) * channels + c
    tl.store(out, tl.sum(first, 0), is_channel)
    tl.store(out + channels, tl.sum(second, 0), is_channel)


@_jit
def _moments(
    x, sums_T2C, mean_TC, invstd_TC, running_mean, running_var, channels, samples,
    x_step: tl.int64, c_step, momentum, unbiased, eps, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / deviation of each step from its sums, and the running statistics.

    `unbiased` is samples / (samples - 1).
    """
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = c < channels
    running_mean_C = tl.load(running_mean + c, mask, 0.0).to(tl.float32)
    running_var_C = tl.load(running_var + c, mask, 1.0).to(tl.float32)
    for t in range(STEPS):
        at_shift = x + t * x_step + c.to(tl.int64) * c_step
        at_sums = sums_T2C + t * 2 * channels + c
        offset = tl.load(at_sums, mask, 0.0) / samples
        square = tl.load(at_sums + channels, mask, 0.0) / samples
        mean = tl.load(at_shift, mask, 0.0).to(tl.float32) + offset
        variance = tl.maximum(square - offset * offset, 0.0)
        tl.store(mean_TC + t * channels + c, mean, mask)
        tl.store(invstd_TC + t * channels + c, 1.0 / tl.sqrt_rn(variance + eps), mask)
        running_mean_C += momentum * (mean - running_mean_C)
        running_var_C += momentum * (variance * unbiased - running_var_C)
    tl.store(running_mean + c, running_mean_C, mask)
    tl.store(running_var + c, running_var_C, mask)


@_jit
def _normalized(
    x, g, weight, bias, mean_TC, invstd_TC, sums_T2C, y, size, channels, samples, x_step, g_step,
    c_step, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y of one time step, or in the backward the gradient of x."""
    t = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    c = (i // c_step) % channels
    at = t * channels + c
    invstd = tl.load(invstd_TC + at, mask, 0.0)
    x_i = tl.load(x + t * x_step + i, mask, 0.0).to(tl.float32)
    x_hat = (x_i - tl.load(mean_TC + at, mask, 0.0)) * invstd
    scale = tl.load(weight + c, mask, 0.0).to(tl.float32)
    if BACKWARD:
        g_i = tl.load(g + t * g_step + i, mask, 0.0).to(tl.float32)
        at_sums = sums_T2C + t * 2 * channels + c
        mean_g = tl.load(at_sums, mask, 0.0) / samples
        mean_product = tl.load(at_sums + channels, mask, 0.0) * invstd / samples
        y_i = (g_i - mean_g - x_hat * mean_product) * invstd * scale
    else:
        y_i = x_hat * scale + tl.load(bias + c, mask, 0.0).to(tl.float32)
    tl.store(y + t * size + i, y_i.to(y.dtype.element_ty), mask)


def step_norm_forward(
    x_TBC: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward of `step_norm.py`."""
    steps, channels = len(x_TBC), len(weight)
    mean_TC = torch.empty(steps, channels, dtype=torch.float32, device=x_TBC.device)
    invstd_TC, samples = torch.empty_like(mean_TC), x_TBC.numel() // (steps * channels)
    _moments[(triton.cdiv(channels, 128),)](
        x_TBC, _sums(x_TBC, None, None), mean_TC, invstd_TC, running_mean, running_var, channels,
        float(samples), time_stride(x_TBC), x_TBC.stride(2), float(momentum),
        samples / (samples - 1), float(eps), STEPS=steps, BLOCK=128,
    )  # fmt: skip
    y_TBC, size = new_steps(x_TBC, x_TBC.dtype), samples * channels
    _normalized[(*_grid(size), steps)](
        x_TBC, None, weight, bias, mean_TC, invstd_TC, None, y_TBC, size, channels, float(samples),
        time_stride(x_TBC), 0, x_TBC.stride(2), BACKWARD=False, BLOCK=BLOCK,
    )  # fmt: skip
    return y_TBC, mean_TC, invstd_TC


def step_norm_backward(
    g_TBC: Tensor, x_TBC: Tensor, weight: Tensor, mean_TC: Tensor, invstd_TC: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of `step_norm.py`."""
    steps, channels = mean_TC.shape
    sums_T2C, size = _sums(x_TBC, g_TBC, mean_TC), x_TBC.numel() // steps
    g_x_TBC = new_steps(x_TBC, x_TBC.dtype)
    _normalized[(*_grid(size), steps)](
        x_TBC, g_TBC, weight, None, mean_TC, invstd_TC, sums_T2C, g_x_TBC, size, channels,
        float(size // channels), time_stride(x_TBC), time_stride(g_TBC), x_TBC.stride(2),
        BACKWARD=True, BLOCK=BLOCK,
    )  # fmt: skip
    g_bias_TC, products_TC = sums_T2C.unbind(1)
    g_weight = (products_TC * invstd_TC).sum(0, dtype=weight.dtype)
    return g_x_TBC, g_weight, g_bias_TC.sum(0, dtype=weight.dtype)


def _sums(x_TBC: Tensor, g_TBC: Tensor | None, mean_TC: Tensor | None) -> Tensor:
    """The two sums of `_norm_sums` for each time step and channel, `[T, 2, C]`."""
    steps, batch, channels = x_TBC.shape[:3]
    pixels = x_TBC.numel() // (steps * batch * channels)
    channels_last = x_TBC.stride(2) == 1 and pixels > 1
    width = 32 if x_TBC.stride(2) == 1 else 1  # channels that lie side by side in memory
    rows, blocks = 1024 // width, -(-channels // width)
    # Channels alone give too few programs for a GPU. The parts are the same on each GPU, so that
    # the rounding is.
    parts = min(-(-batch * pixels // (4 * rows)), -(-PROGRAMS // (blocks * steps)))
    sums = torch.empty(parts, steps, 2, channels, dtype=torch.float32, device=x_TBC.device)
    _norm_sums[(blocks, steps, parts)](
        x_TBC, g_TBC, mean_TC, sums, batch * pixels, pixels, channels, time_stride(x_TBC),
        time_stride(g_TBC), x_TBC.stride(1), x_TBC.stride(2),
        channels if channels_last else 1, BACKWARD=g_TBC is not None, ROWS=rows, CHANNELS=width,
    )  # fmt: skip
    return sums.sum(0)


@_jit
def _pack(x, bits, count, BLOCK: tl.constexpr):
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, 8)
    i = k[:, None] * 8 + j[None, :]
    is_set = tl.load(x + i, i < count, 0.0) != 0.0
    tl.store(bits + k, tl.sum(is_set.to(tl.int32) << j[None, :], 1).to(tl.uint8), k * 8 < count)


@_jit
def _unpack(bits, x, height, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    bit = (tl.load(bits + i // 8, mask, 0).to(tl.int32) >> (i % 8).to(tl.int32)) & 1
    tl.store(x + i, tl.where(bit != 0, height, 0.0).to(x.dtype.element_ty), mask)


def pack_spikes(x: Tensor) -> Tensor:
    """`pack` of `packing.py`."""
    bits = torch.empty(-(-x.numel() // 8), dtype=torch.uint8, device=x.device)
    _pack[(triton.cdiv(len(bits), 128),)](x, bits, x.numel(), BLOCK=128)
    return bits


def unpack_spikes(bits: Tensor, x: Tensor, height: float) -> None:
    """`unpack` of `packing.py`."""
    _unpack[_grid(x.numel())](bits, x, height, x.numel(), BLOCK=BLOCK)
