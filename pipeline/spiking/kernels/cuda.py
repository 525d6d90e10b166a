"""The neuron's kernels on an NVIDIA GPU: Triton, one program for each block of neurons.

A program runs all time steps of its neurons with the membrane in registers, so each value is read
and written once. The backward reads u, or computes u[t] for each t from the inputs up to t, which
are in the cache.
"""

# T time, B batch

import math

import torch
import triton
from torch import Tensor
from triton import language as tl

from pipeline.spiking.kernels.operators import new_step, new_steps

BLOCK = 1024


@triton.jit
def _charge(v, x, decay, inverse_beta, CHARGE: tl.constexpr, SCALES: tl.constexpr):
    """u from the membrane and the input, which is scaled in its own dtype, as in eager."""
    current = x.to(tl.float32)
    if SCALES:
        current = (current * inverse_beta).to(x.dtype).to(tl.float32)
    if CHARGE == 0:
        return tl.fma(v, decay, current)
    elif CHARGE == 1:
        return tl.fma(v, decay, (1.0 - decay) * current)
    else:  # as torch.lerp
        nearer = tl.where(decay < 0.5, current, v)
        return tl.fma(v - current, tl.where(decay < 0.5, decay, decay - 1.0), nearer)


@triton.jit
def _reset(u, threshold, subtract, TO_ZERO: tl.constexpr):
    fires = u - threshold >= 0.0
    return tl.where(fires, 0.0 if TO_ZERO else u - subtract, u)


@triton.jit
def _derivative(distance, a, b, SURROGATE: tl.constexpr):
    """The surrogate's derivative; a, b and SURROGATE are those of `surrogate_constants`."""
    if SURROGATE == 0:
        return tl.maximum(a - b * tl.abs(distance), 0.0)
    elif SURROGATE == 1:
        e = tl.exp(-tl.abs(a * distance))
        return a * e / ((1.0 + e) * (1.0 + e))
    elif SURROGATE == 2:
        return tl.where(tl.abs(distance) <= a, b, 0.0)
    else:
        z = a * distance
        return b / (1.0 + z * z)


@triton.jit
def _forward(
    x, v0, learnt_decay, levels, s, v_end, u, neurons, x_step, decay, threshold, subtract, gain,
    inverse_beta, STEPS: tl.constexpr, CHARGE: tl.constexpr, TO_ZERO: tl.constexpr,
    HAS_V: tl.constexpr, LEARNT: tl.constexpr, LEVELS: tl.constexpr, SCALES: tl.constexpr,
    SAVES_U: tl.constexpr, BLOCK: tl.constexpr,
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
    for t in range(STEPS):
        v = _charge(v, tl.load(x + t * x_step + i, mask, 0.0), decay, inverse_beta, CHARGE, SCALES)
        if SAVES_U:
            tl.store(u + t * neurons + i, v, mask)
        spikes = tl.where(v - threshold >= 0.0, gain, 0.0)
        tl.store(s + t * neurons + i, spikes.to(s.dtype.element_ty), mask)
        v = _reset(v, threshold, subtract, TO_ZERO)
    tl.store(v_end + i, v, mask)


@triton.jit
def _backward(
    u, x, v0, learnt_decay, g_s, g_v_end, g_x, g_v0, g_decay, neurons, x_step, g_s_step, decay,
    threshold, subtract, gain, inverse_beta, a, b, STEPS: tl.constexpr, CHARGE: tl.constexpr,
    TO_ZERO: tl.constexpr, HAS_U: tl.constexpr, HAS_V: tl.constexpr, LEARNT: tl.constexpr,
    SCALES: tl.constexpr, HAS_G_S: tl.constexpr, HAS_G_V: tl.constexpr, NEEDS_V: tl.constexpr,
    SURROGATE: tl.constexpr, RESET_GRADIENT: tl.constexpr, CUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < neurons
    if LEARNT:
        decay = tl.load(learnt_decay).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    g_v = tl.load(g_v_end + i, mask, 0.0) if HAS_G_V else tl.zeros((BLOCK,), tl.float32)
    first = tl.load(v0 + i, mask, 0.0) if HAS_V else tl.zeros((BLOCK,), tl.float32)
    for back in range(STEPS):
        t = STEPS - 1 - back
        v = first  # v[t-1]
        if HAS_U:
            u_t = tl.load(u + t * neurons + i, mask, 0.0)
            if LEARNT and t > 0:
                before = tl.load(u + (t - 1) * neurons + i, mask, 0.0)
                v = _reset(before, threshold, subtract, TO_ZERO)
        else:
            for k in range(t):
                x_k = tl.load(x + k * x_step + i, mask, 0.0)
                u_k = _charge(v, x_k, decay, inverse_beta, CHARGE, SCALES)
                v = _reset(u_k, threshold, subtract, TO_ZERO)
            x_t = tl.load(x + t * x_step + i, mask, 0.0)
            u_t = _charge(v, x_t, decay, inverse_beta, CHARGE, SCALES)
        distance = u_t - threshold
        g = tl.zeros((BLOCK,), tl.float32)
        if HAS_G_S:
            g_s_t = tl.load(g_s + t * g_s_step + i, mask, 0.0)
            g = (g_s_t.to(tl.float32) * gain).to(g_s_t.dtype).to(tl.float32)
        if RESET_GRADIENT:
            g -= g_v * (u_t if TO_ZERO else subtract)
        g = g * _derivative(distance, a, b, SURROGATE)
        g += tl.where(distance >= 0.0, 0.0, g_v) if TO_ZERO else g_v
        if LEARNT:
            if CHARGE == 2:
                x_t = tl.load(x + t * x_step + i, mask, 0.0)
                v -= (x_t.to(tl.float32) * inverse_beta).to(x_t.dtype).to(tl.float32)
            total += g * v
        current = g if CHARGE == 0 else g * (1.0 - decay)
        if SCALES:
            current = current.to(g_x.dtype.element_ty).to(tl.float32) * inverse_beta
        tl.store(g_x + t * neurons + i, current.to(g_x.dtype.element_ty), mask)
        g_v = g * decay
        if NEEDS_V and t == 0:
            tl.store(g_v0 + i, g_v, mask)
        if CUT:
            g_v = tl.zeros((BLOCK,), tl.float32)
    if LEARNT:
        tl.store(g_decay + tl.program_id(0), tl.sum(tl.where(mask, total, 0.0), 0))


def lif_forward(
    x_TB: Tensor,
    v_B: Tensor | None,
    learnt_decay: Tensor | None,
    levels: Tensor | None,
    charge: int,
    decay: float,
    threshold: float,
    subtract: float | None,
    gain: float,
    beta: float,
    saves_u: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The forward of `neuron.py`."""
    steps, neurons = len(x_TB), math.prod(x_TB.shape[1:])
    s_TB, v_end_B = new_steps(x_TB, x_TB.dtype), new_step(x_TB, torch.float32)
    u_TB = new_steps(x_TB, torch.float32) if saves_u else None
    _forward[_grid(neurons)](
        x_TB,
        v_B,
        learnt_decay,
        levels,
        s_TB,
        v_end_B,
        u_TB,
        neurons,
        _step(x_TB),
        decay,
        threshold,
        subtract or 0.0,
        gain,
        1 / beta,
        STEPS=steps,
        CHARGE=charge,
        TO_ZERO=subtract is None and levels is None,
        HAS_V=v_B is not None,
        LEARNT=learnt_decay is not None,
        LEVELS=levels is not None,
        SCALES=beta != 1,
        SAVES_U=saves_u,
        BLOCK=BLOCK,
        enable_fp_fusion=False,  # type: ignore[call-arg]  # of the compiler
    )
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
    subtract: float | None,
    gain: float,
    beta: float,
    surrogate: int,
    a: float,
    b: float,
    reset_gradient: bool,
    cut: bool,
    needs_v: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The backward of `neuron.py`."""
    like = x_TB if u_TB is None else u_TB
    assert like is not None
    steps, neurons = len(like), math.prod(like.shape[1:])
    g_x_TB = new_steps(like, dtype)
    g_v0_B = new_step(like, torch.float32) if needs_v else None
    sums = None
    if learnt_decay is not None:
        sums = torch.empty(_grid(neurons), dtype=torch.float32, device=like.device)
    _backward[_grid(neurons)](
        u_TB,
        x_TB,
        v_B,
        learnt_decay,
        g_s_TB,
        g_v_B,
        g_x_TB,
        g_v0_B,
        sums,
        neurons,
        0 if x_TB is None else _step(x_TB),
        0 if g_s_TB is None else _step(g_s_TB),
        decay,
        threshold,
        subtract or 0.0,
        gain,
        1 / beta,
        a,
        b,
        STEPS=steps,
        CHARGE=charge,
        TO_ZERO=subtract is None,
        HAS_U=u_TB is not None,
        HAS_V=v_B is not None,
        LEARNT=learnt_decay is not None,
        SCALES=beta != 1,
        HAS_G_S=g_s_TB is not None,
        HAS_G_V=g_v_B is not None,
        NEEDS_V=needs_v,
        SURROGATE=surrogate,
        RESET_GRADIENT=reset_gradient,
        CUT=cut,
        BLOCK=BLOCK,
        enable_fp_fusion=False,  # type: ignore[call-arg]  # of the compiler
    )
    return g_x_TB, g_v0_B, None if sums is None else sums.sum().view(1).to(dtype)


def _grid(neurons: int) -> tuple[int]:
    return (triton.cdiv(neurons, BLOCK),)


@triton.jit
def _scaled_add(x, b, gain, y, alpha, size, x_step, b_step, step, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    t, n = i // step, i % step
    x_i = tl.load(x + t * x_step + n, mask, 0.0).to(tl.float32)
    b_i = tl.load(b + t * b_step + n, mask, 0.0).to(tl.float32)
    y_i = tl.fma(b_i, alpha * tl.load(gain).to(tl.float32), x_i)
    tl.store(y + i, y_i.to(y.dtype.element_ty), mask)


@triton.jit
def _scaled_add_backward(
    g, b, gain, g_b, sums, alpha, size, g_step, b_step, step, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    t, n = i // step, i % step
    g_i = tl.load(g + t * g_step + n, mask, 0.0).to(tl.float32)
    b_i = tl.load(b + t * b_step + n, mask, 0.0).to(tl.float32)
    g_b_i = g_i * (alpha * tl.load(gain).to(tl.float32))
    tl.store(g_b + i, g_b_i.to(g_b.dtype.element_ty), mask)
    tl.store(sums + tl.program_id(0), tl.sum(g_i * b_i, 0))


def scaled_add_forward(x_TB: Tensor, b_TB: Tensor, gain: Tensor, alpha: float) -> Tensor:
    """The forward of `scaled_add.py`."""
    y_TB = new_steps(b_TB, b_TB.dtype)
    size, step = y_TB.numel(), math.prod(y_TB.shape[1:])
    _scaled_add[_grid(size)](
        x_TB,
        b_TB,
        gain,
        y_TB,
        alpha,
        size,
        _step(x_TB),
        _step(b_TB),
        step,
        BLOCK=BLOCK,  # type: ignore[arg-type]
    )
    return y_TB


def scaled_add_backward(
    g_TB: Tensor, b_TB: Tensor, gain: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """The backward of `scaled_add.py`."""
    g_b_TB = new_steps(b_TB, b_TB.dtype)
    size, step = g_b_TB.numel(), math.prod(g_b_TB.shape[1:])
    sums = torch.empty(_grid(size), dtype=torch.float32, device=b_TB.device)
    _scaled_add_backward[_grid(size)](
        g_TB,
        b_TB,
        gain,
        g_b_TB,
        sums,
        alpha,
        size,
        _step(g_TB),
        _step(b_TB),
        step,
        BLOCK=BLOCK,  # type: ignore[arg-type]
    )
    return g_b_TB, sums.sum(dtype=gain.dtype).mul_(alpha).view(1)


def _step(x_TB: Tensor) -> int:
    """The distance between time steps; 0 for a static input."""
    return x_TB.stride(0) if len(x_TB) > 1 else 0


@triton.jit
def _norm_sums(
    x, g, mean, invstd, first, second, rows, pixels, channels, eps, t_step, b_step, c_step, p_step,
    BACKWARD: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """For one time step and a block of channels: mean and invstd; in the backward the sums of g and
    of g (x - mean) invstd.
    """
    t = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = c < channels
    at = t * t_step + c * c_step
    if BACKWARD:
        shift = tl.load(mean + t * channels + c, is_channel, 0.0)
    else:  # the first value of each channel, so that the squares stay small
        shift = tl.load(x + at, is_channel, 0.0).to(tl.float32)
    sums = tl.zeros((ROWS, CHANNELS), tl.float32)
    products = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < rows)[:, None] & is_channel[None, :]
        of_row = (row // pixels) * b_step + (row % pixels) * p_step
        x_RC = tl.load(x + of_row[:, None] + at[None, :], mask, 0.0).to(tl.float32)
        centred = tl.where(mask, x_RC - shift[None, :], 0.0)
        factor = centred
        if BACKWARD:
            factor = tl.load(g + of_row[:, None] + at[None, :], mask, 0.0).to(tl.float32)
        sums += factor
        products += factor * centred
    total, product = tl.sum(sums, 0), tl.sum(products, 0)
    out = t * channels + c
    if BACKWARD:
        tl.store(first + out, total, is_channel)
        tl.store(second + out, product * tl.load(invstd + out, is_channel, 0.0), is_channel)
    else:
        offset = total / rows
        variance = tl.maximum(product / rows - offset * offset, 0.0)
        tl.store(first + out, shift + offset, is_channel)
        tl.store(second + out, 1.0 / tl.sqrt_rn(variance + eps), is_channel)


@triton.jit
def _running_statistics(
    mean, invstd, running_mean, running_var, channels, samples, momentum, eps, STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = c < channels
    mean_C = tl.load(running_mean + c, mask, 0.0)
    var_C = tl.load(running_var + c, mask, 1.0)
    for t in range(STEPS):
        invstd_C = tl.load(invstd + t * channels + c, mask, 1.0)
        unbiased_C = (1.0 / (invstd_C * invstd_C) - eps) * (samples / (samples - 1.0))
        mean_C += momentum * (tl.load(mean + t * channels + c, mask, 0.0) - mean_C)
        var_C += momentum * (unbiased_C - var_C)
    tl.store(running_mean + c, mean_C, mask)
    tl.store(running_var + c, var_C, mask)


@triton.jit
def _normalized(
    x, g, weight, bias, mean, invstd, g_sums, g_products, y, size, step, channels, samples, c_step,
    BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y, or in the backward the gradient of x."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    c = (i // c_step) % channels
    at = (i // step) * channels + c
    scale = tl.load(invstd + at, mask, 0.0)
    x_hat = (tl.load(x + i, mask, 0.0).to(tl.float32) - tl.load(mean + at, mask, 0.0)) * scale
    if BACKWARD:
        g_i = tl.load(g + i, mask, 0.0).to(tl.float32)
        mean_g = tl.load(g_sums + at, mask, 0.0) / samples
        mean_product = tl.load(g_products + at, mask, 0.0) / samples
        of_x = g_i - mean_g - x_hat * mean_product
        y_i = of_x * scale * tl.load(weight + c, mask, 0.0).to(tl.float32)
    else:
        y_i = x_hat * tl.load(weight + c, mask, 0.0).to(tl.float32)
        y_i += tl.load(bias + c, mask, 0.0).to(tl.float32)
    tl.store(y + i, y_i.to(y.dtype.element_ty), mask)


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
    invstd_TC = torch.empty_like(mean_TC)
    samples = x_TBC.numel() // (steps * channels)
    _sum_steps(x_TBC, None, None, None, mean_TC, invstd_TC, eps)
    _running_statistics[(triton.cdiv(channels, 128),)](
        mean_TC, invstd_TC, running_mean, running_var, channels, samples, momentum, eps,
        STEPS=steps, BLOCK=128,
    )  # fmt: skip
    y_TBC = torch.empty_like(x_TBC)
    _normalized[_grid(x_TBC.numel())](
        x_TBC, None, weight, bias, mean_TC, invstd_TC, None, None, y_TBC, x_TBC.numel(),
        x_TBC[0].numel(), channels, samples, x_TBC.stride(2), BACKWARD=False, BLOCK=BLOCK,
    )  # fmt: skip
    return y_TBC, mean_TC, invstd_TC


def step_norm_backward(
    g_TBC: Tensor, x_TBC: Tensor, weight: Tensor, mean_TC: Tensor, invstd_TC: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of `step_norm.py`."""
    steps, channels = mean_TC.shape
    sums_TC, products_TC = torch.empty_like(mean_TC), torch.empty_like(mean_TC)
    _sum_steps(x_TBC, g_TBC, mean_TC, invstd_TC, sums_TC, products_TC, 0.0)
    g_x_TBC = torch.empty_like(x_TBC)
    _normalized[_grid(x_TBC.numel())](
        x_TBC, g_TBC, weight, None, mean_TC, invstd_TC, sums_TC, products_TC, g_x_TBC,
        x_TBC.numel(), x_TBC[0].numel(), channels, x_TBC.numel() // (steps * channels),
        x_TBC.stride(2), BACKWARD=True, BLOCK=BLOCK,
    )  # fmt: skip
    dtype = weight.dtype
    return g_x_TBC, products_TC.sum(0, dtype=dtype), sums_TC.sum(0, dtype=dtype)


def _sum_steps(
    x_TBC: Tensor,
    g_TBC: Tensor | None,
    mean_TC: Tensor | None,
    invstd_TC: Tensor | None,
    first_TC: Tensor,
    second_TC: Tensor,
    eps: float,
) -> None:
    steps, batch, channels = x_TBC.shape[:3]
    pixels = x_TBC.numel() // (steps * batch * channels)
    channels_last = x_TBC.stride(2) == 1 and pixels > 1
    width = 32 if x_TBC.stride(2) == 1 else 1  # channels that lie side by side in memory
    _norm_sums[(triton.cdiv(channels, width), steps)](
        x_TBC, g_TBC, mean_TC, invstd_TC, first_TC, second_TC, batch * pixels, pixels, channels,
        eps, x_TBC.stride(0), x_TBC.stride(1), x_TBC.stride(2), channels if channels_last else 1,
        BACKWARD=g_TBC is not None, ROWS=4096 // (4 * width), CHANNELS=width,
    )  # fmt: skip


@triton.jit
def _pack(x, bits, count, BLOCK: tl.constexpr):
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, 8)
    i = k[:, None] * 8 + j[None, :]
    is_set = tl.load(x + i, i < count, 0.0) != 0.0
    tl.store(bits + k, tl.sum(is_set.to(tl.int32) << j[None, :], 1).to(tl.uint8), k * 8 < count)


@triton.jit
def _unpack(bits, x, height, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    bit = (tl.load(bits + i // 8, mask, 0).to(tl.int32) >> (i % 8).to(tl.int32)) & 1
    tl.store(x + i, tl.where(bit != 0, height, 0.0).to(x.dtype.element_ty), mask)


def pack_spikes(x: Tensor) -> Tensor:
    """`pack` of `packing.py`."""
    bits = torch.empty(-(-x.numel() // 8), dtype=torch.uint8, device=x.device)
    _pack[(triton.cdiv(len(bits), 128),)](x, bits, x.numel(), BLOCK=128)  # type: ignore[arg-type]
    return bits


def unpack_spikes(bits: Tensor, x: Tensor, height: float) -> None:
    """`unpack` of `packing.py`."""
    _unpack[_grid(x.numel())](bits, x, height, x.numel(), BLOCK=BLOCK)  # type: ignore[arg-type]
