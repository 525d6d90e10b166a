"""The neuron's kernels on a CPU: numba, in blocks of neurons that stay in the CPU's cache.

A kernel runs all time steps of a block before the next block, so memory is read and written once.
The GIL is released, and the blocks are divided among as many threads as torch uses. The threads are
Python's, because numba's own thread pool aborts a process if FFCV's loaders use it at the same
time. The loops are compiled once per machine.

The arithmetic is torch's, operation by operation, so spikes and membranes have the same bits.
"""

# T time, N neurons of the batch

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic, overload
from torch import Tensor

from pipeline.core.saved_loops import compiled, folder_of, saved_in
from pipeline.spiking.kernels.max_pool import new_pooled
from pipeline.spiking.kernels.neuron import Constants
from pipeline.spiking.kernels.operators import (
    membrane_dtype,
    new_step,
    new_steps,
    time_stride,
)

_intrinsic: Any = intrinsic  # numba's types are of what is compiled
BLOCK = 16384  # neurons; their values of one time step take 64 kB, long enough to be prefetched
MIN_PER_THREAD = 1 << 15  # values; fewer take less time than to wake a thread

saved: Any = partial(saved_in, folder_of("kernels", [Path(__file__)]))


# ------------------------------------------------------------------------------------------ scalars


@_intrinsic
def _fma(_: Any, x: Any, y: Any, z: Any) -> Any:
    """x y + z, rounded once, as torch.add and torch.lerp compute it on a CPU."""
    return x(x, x, x), lambda context, builder, signature, args: builder.fma(*args)


@_intrinsic
def _power_of_two(_: Any, exponent: Any) -> Any:
    """2^exponent for an int32 in -126..127: the exponent bits of a float32."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer = ir.IntType(32)
        biased = builder.add(args[0], ir.Constant(integer, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(integer, 23)), ir.FloatType())

    return types.float32(types.int32), code


@_intrinsic
def _pointer(_: Any, address: Any, like: Any) -> Any:
    """The address of numbers of the type of `like`, as a pointer."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), code


def _exp(x: Any) -> Any:
    raise NotImplementedError("compiled only")


@overload(_exp, inline="always", strict=False)
def _exp_of(x: Any) -> Any:
    """e^x for x <= 0. LLVM has no vector code for the exponential of C; this has, to 2 units in the
    last place of a float32: x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial for e^r.
    """
    if x != types.float32:
        return lambda x: math.exp(x)
    f = np.float32
    per_ln2, ln2_high, ln2_low = f(1.44269504), f(0.693145752), f(1.42860677e-6)
    least, half, one = f(-87.0), f(0.5), f(1)
    c2, c3, c4, c5, c6 = f(0.5), f(1 / 6), f(1 / 24), f(1 / 120), f(1 / 720)

    def fast(x):
        x = max(x, least)
        n = np.floor(x * per_ln2 + half)
        r = _fma(n, -ln2_low, _fma(n, -ln2_high, x))
        e = _fma(_fma(_fma(_fma(_fma(_fma(c6, r, c5), r, c4), r, c3), r, c2), r, one), r, one)
        return e * _power_of_two(np.int32(n))

    return fast


# ------------------------------------------------------------------------------------------ forward


@compiled
def _after_reset(u, v, threshold, margin, reset, subtract):
    if reset == 0:
        zero = threshold - threshold
        for i in range(len(u)):
            v[i] = zero if u[i] - threshold >= margin else u[i]
    else:
        for i in range(len(u)):
            v[i] = u[i] - subtract if u[i] - threshold >= margin else u[i]


@saved
def _forward(
    first, end, neurons, steps, x_at, x_step, v0_at, s_at, v_end_at, u_at, charge, decay, current,
    threshold, margin, reset, subtract, gain, beta, resets_first,
):  # fmt: skip
    """The neurons from `first` to `end`. Names with `_at` are addresses; 0: there is none.

    `x_step` is the distance between time steps, 0 for a static input.
    """
    zero, one = decay - decay, beta / beta
    x = carray(_pointer(x_at, decay), x_step * (steps - 1) + neurons)
    v0 = carray(_pointer(v0_at, decay), neurons if v0_at else 0)
    s = carray(_pointer(s_at, decay), steps * neurons if s_at else 0)  # none: a backward needs u
    v_end = carray(_pointer(v_end_at, decay), neurons if v_end_at else 0)
    u = carray(_pointer(u_at, decay), steps * neurons if u_at else 0)
    current_of, v_of = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype)
    u_of = np.empty(BLOCK, x.dtype)
    for begin in range(first, end, BLOCK):
        stop = min(begin + BLOCK, end)
        count = stop - begin
        v = v_end[begin:stop] if len(v_end) else v_of[:count]
        if len(v0) and resets_first:
            _after_reset(v0[begin:stop], v, threshold, margin, reset, subtract)
        elif len(v0):
            v[:] = v0[begin:stop]
        else:
            v[:] = zero
        for t in range(steps):
            x_t = x[t * x_step + begin : t * x_step + stop]
            if beta != one:
                for i in range(count):
                    current_of[i] = x_t[i] / beta
                x_t = current_of[:count]
            u_t = u[t * neurons + begin : t * neurons + stop] if len(u) else u_of[:count]
            if charge == 0:
                for i in range(count):
                    u_t[i] = _fma(decay, v[i], x_t[i])
            elif charge == 1:
                for i in range(count):
                    u_t[i] = _fma(decay, v[i], current * x_t[i])
            elif decay < one / 2:  # torch.lerp
                for i in range(count):
                    u_t[i] = _fma(decay, v[i] - x_t[i], x_t[i])
            else:
                for i in range(count):
                    u_t[i] = _fma(decay - one, v[i] - x_t[i], v[i])
            if len(s):
                s_t = s[t * neurons + begin : t * neurons + stop]
                for i in range(count):
                    s_t[i] = gain if u_t[i] - threshold >= margin else zero
            _after_reset(u_t, v, threshold, margin, reset, subtract)


# ----------------------------------------------------------------------------------------- backward


@compiled
def _times_derivative(g, u, threshold, surrogate, a, b):
    """Multiply `g` by the derivative of the surrogate."""
    zero, one = threshold - threshold, a / a
    if surrogate == 0:
        for i in range(len(u)):
            g[i] *= max(a - b * abs(u[i] - threshold), zero)
    elif surrogate == 1:
        for i in range(len(u)):
            e = _exp(-abs(a * (u[i] - threshold)))
            g[i] *= a * e / ((one + e) * (one + e))
    elif surrogate == 2:
        for i in range(len(u)):
            g[i] *= b if abs(u[i] - threshold) <= a else zero
    elif surrogate == 3:
        for i in range(len(u)):
            z = a * (u[i] - threshold)
            g[i] *= one / (one + z * z) * b
    else:
        for i in range(len(u)):
            z = one + abs(a * (u[i] - threshold))
            g[i] *= one / (z * z)


@saved
def _backward(
    first, end, neurons, steps, u_at, v0_at, x_at, x_step, g_s_at, g_s_step, g_v_end_at, g_x_at,
    g_x_step, g_v0_at, g_decay, charge, decay, current, threshold, margin, reset, subtract, gain,
    beta, resets_first, surrogate, a, b, reset_gradient, cut,
):  # fmt: skip
    """As `_forward`. `g_decay` has one sum for each block; empty: the decay is not learnt. Without
    `u_at`, u of each block is computed again.
    """
    zero, one = decay - decay, beta / beta
    size = steps * neurons
    u = carray(_pointer(u_at, decay), size if u_at else 0)
    v0 = carray(_pointer(v0_at, decay), neurons if v0_at else 0)
    x = carray(_pointer(x_at, decay), x_step * (steps - 1) + neurons if x_at else 0)
    g_s = carray(_pointer(g_s_at, decay), g_s_step * (steps - 1) + neurons if g_s_at else 0)
    g_v_end = carray(_pointer(g_v_end_at, decay), neurons if g_v_end_at else 0)
    g_x = carray(_pointer(g_x_at, decay), g_x_step * (steps - 1) + neurons)
    g_v0 = carray(_pointer(g_v0_at, decay), neurons if g_v0_at else 0)
    g_v, g, v = np.empty(BLOCK, u.dtype), np.empty(BLOCK, u.dtype), np.empty(BLOCK, u.dtype)
    u_of = np.empty(0 if u_at else steps * BLOCK, u.dtype)
    for begin in range(first, end, BLOCK):
        stop = min(begin + BLOCK, end)
        count = stop - begin
        u_block, u_step = (u[begin:], neurons) if u_at else (u_of, count)
        if u_at == 0:
            offset = begin * u.itemsize  # bytes
            _forward(
                0, count, count, steps, x_at + offset, x_step, v0_at + offset if v0_at else 0, 0, 0,
                u_of.ctypes.data, charge, decay, current, threshold, margin, reset, subtract, gain,
                beta, resets_first,
            )  # fmt: skip
        total = 0.0
        has_g_v = len(g_v_end) > 0
        if has_g_v:
            g_v[:count] = g_v_end[begin:stop]
        for t in range(steps - 1, -1, -1):
            u_t = u_block[t * u_step : t * u_step + count]
            if len(g_s):
                g_s_t = g_s[t * g_s_step + begin : t * g_s_step + stop]
                for i in range(count):
                    g[i] = g_s_t[i] * gain
            else:
                g[:] = zero
            if reset_gradient and has_g_v:
                if reset == 0:
                    for i in range(count):
                        g[i] -= g_v[i] * u_t[i]
                else:
                    for i in range(count):
                        g[i] -= g_v[i] * subtract
            _times_derivative(g, u_t, threshold, surrogate, a, b)
            if has_g_v:
                if reset == 0:
                    for i in range(count):
                        g[i] += zero if u_t[i] - threshold >= margin else g_v[i]
                else:
                    for i in range(count):
                        g[i] += g_v[i]
            if len(g_decay):
                v[:] = zero
                if t > 0:
                    before = u_block[(t - 1) * u_step : (t - 1) * u_step + count]
                    _after_reset(before, v, threshold, margin, reset, subtract)
                elif len(v0) and resets_first:
                    _after_reset(v0[begin:stop], v, threshold, margin, reset, subtract)
                elif len(v0):
                    v[:count] = v0[begin:stop]
                if charge >= 2:
                    for i in range(count):
                        v[i] -= x[t * x_step + begin + i] / beta
                for i in range(count):
                    total += g[i] * v[i]
            g_x_t = g_x[t * g_x_step + begin : t * g_x_step + stop]
            if g_x_step == 0 and t < steps - 1:
                for i in range(count):
                    g_x_t[i] += g[i] * current / beta
            elif current != one or beta != one:
                for i in range(count):
                    g_x_t[i] = g[i] * current / beta
            else:
                for i in range(count):
                    g_x_t[i] = g[i]
            has_g_v = not cut
            if has_g_v or t == 0:
                for i in range(count):
                    g_v[i] = g[i] * decay
        if len(g_v0):
            g_v0[begin:stop] = g_v[:count]
        if len(g_decay):
            g_decay[begin // BLOCK] = total


# ------------------------------------------------------------------------------------------ threads


def _in_threads(kernel: Any, items: int, values: int, *args: Any, block: int = BLOCK) -> None:
    """Run `kernel(first, end, *args)` for all items, in as many threads as torch uses.

    `values` is the number of values that the kernel reads; for few, one thread is faster. A thread
    gets whole blocks of items.
    """
    threads = min(torch.get_num_threads(), values // MIN_PER_THREAD)
    if threads <= 1:
        kernel(0, items, *args)
        return
    blocks = -(-items // block)
    edges = [min(items, blocks * part // threads * block) for part in range(threads + 1)]
    others = [
        _pool(os.getpid()).submit(kernel, first, end, *args) for first, end in pairwise(edges[1:])
    ]
    kernel(edges[0], edges[1], *args)
    for each in others:
        each.result()


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of this process. A forked process needs its own."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="neurons")


# -------------------------------------------------------------------------------------------- torch

_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}
_POSITIONS = {torch.int16: np.int16, torch.int32: np.int32}
_NO_SUMS = np.empty(0)


def lif_forward(
    x_TB: Tensor,
    v_B: Tensor | None,
    learnt_decay: Tensor | None,
    levels: Tensor | None,
    end_B: Tensor | None,
    *about: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The forward of `neuron.py`. `about`: the `Constants`, saves_u and needs_end.

    The last membrane is written to `end_B`, or to a new tensor if needs_end.
    """
    constants, (saves_u, needs_end) = Constants(*about[:8]), about[8:]
    if levels is not None:
        threshold, subtract, gain = levels.tolist()
        constants = constants._replace(threshold=threshold, subtract=subtract, gain=gain)
    dtype = membrane_dtype(x_TB)
    s_TB, u_TB = new_steps(x_TB, dtype), new_steps(x_TB, dtype) if saves_u else None
    v_end_B = new_step(x_TB, dtype) if needs_end else None
    x_dtype = x_TB.dtype
    if x_dtype != dtype:
        if constants.beta != 1:  # rounded in its own dtype, as in eager
            x_TB, constants = x_TB / constants.beta, constants._replace(beta=1.0)
        x_TB = x_TB.to(dtype)
    steps, neurons = len(x_TB), math.prod(x_TB.shape[1:])
    _in_threads(
        _forward,
        neurons,
        neurons * steps,
        neurons,
        steps,
        x_TB.data_ptr(),
        time_stride(x_TB),
        _address(v_B),
        s_TB.data_ptr(),
        _address(v_end_B if end_B is None else end_B),
        _address(u_TB),
        *_numbers(constants, learnt_decay, dtype),
    )
    return s_TB.to(x_dtype), v_end_B, u_TB


def lif_backward(
    u_TB: Tensor | None,
    x_TB: Tensor | None,
    v_B: Tensor | None,
    learnt_decay: Tensor | None,
    g_s_TB: Tensor | None,
    g_v_B: Tensor | None,
    dtype: torch.dtype,
    *about: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The backward of `neuron.py`. `about`: the `Constants`, three numbers of the surrogate,
    reset_gradient, cut, needs_v and sums_steps.
    """
    constants, (surrogate, a, b, reset_gradient, cut) = Constants(*about[:8]), about[8:13]
    needs_v, sums_steps = about[13:]
    like = x_TB if u_TB is None else u_TB
    assert like is not None
    wide = membrane_dtype(like)
    f, steps, neurons = _DTYPES[wide], len(like), math.prod(like.shape[1:])
    g_x_TB = new_steps(like[:1] if sums_steps else like, wide)
    g_v0_B = new_step(like, wide) if needs_v else None
    sums = _NO_SUMS if learnt_decay is None else np.empty(-(-neurons // BLOCK))
    last_beta = 1.0
    if wide != dtype:  # scaled and rounded in the tensors' own dtype, as in eager
        last_beta = constants.beta
        g_s_TB = None if g_s_TB is None else (g_s_TB * constants.gain).to(wide)
        x_TB = None if x_TB is None else (x_TB / last_beta).to(wide)
        constants = constants._replace(gain=1.0, beta=1.0)
    _in_threads(
        _backward,
        neurons,
        neurons * steps,
        neurons,
        steps,
        _address(u_TB),
        _address(v_B),
        _address(x_TB),
        time_stride(x_TB),
        _address(g_s_TB),
        time_stride(g_s_TB),
        _address(g_v_B),
        g_x_TB.data_ptr(),
        0 if sums_steps else neurons,
        _address(g_v0_B),
        sums,
        *_numbers(constants, learnt_decay, wide),
        surrogate,
        f(a),
        f(b),
        reset_gradient,
        cut,
    )
    g_decay = None if learnt_decay is None else learnt_decay.new_tensor([sums.sum()])
    g_x_TB = g_x_TB.to(dtype)
    return g_x_TB if last_beta == 1 else g_x_TB / last_beta, g_v0_B, g_decay


def _numbers(
    constants: Constants, learnt_decay: Tensor | None, dtype: torch.dtype
) -> tuple[Any, ...]:
    """The kernels' arguments from `charge` to `resets_first`."""
    f = _DTYPES[dtype]
    charge, decay, threshold, margin, subtract, gain, beta, resets_first = constants
    decay = decay if learnt_decay is None else learnt_decay.item()
    current = 1 - decay if charge else 1
    reset = 0 if subtract is None else 1
    return (
        *(charge, f(decay), f(current), f(threshold), f(margin)),
        *(reset, f(subtract or 0), f(gain), f(beta), resets_first),
    )


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def scaled_add_forward(x_TB: Tensor, b_TB: Tensor, gain: Tensor, alpha: float) -> Tensor:
    """The forward of `scaled_add.py`: torch needs no other kernel on a CPU."""
    return torch.addcmul(x_TB, b_TB, gain.to(b_TB.dtype), value=alpha)


def scaled_add_backward(
    g_TB: Tensor, b_TB: Tensor, gain: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """The backward of `scaled_add.py`."""
    g_b_TB = g_TB * (gain * alpha).to(g_TB.dtype)
    return g_b_TB, (alpha * (g_TB * b_TB).sum(dtype=gain.dtype)).view(1)


def step_norm_forward(
    x_TBC: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward of `step_norm.py`: torch's batch norm writes each step into the result."""
    y_TBC = new_steps(x_TBC, x_TBC.dtype)
    mean_TC = weight.new_empty(len(x_TBC), len(weight))
    invstd_TC = torch.empty_like(mean_TC)
    for x_BC, y_BC, mean_C, invstd_C in zip(x_TBC, y_TBC, mean_TC, invstd_TC, strict=True):
        torch.native_batch_norm(
            x_BC, weight, bias, running_mean, running_var, True, momentum, eps,
            out=(y_BC, mean_C, invstd_C),
        )  # fmt: skip
    return y_TBC, mean_TC, invstd_TC


def step_norm_backward(
    g_TBC: Tensor, x_TBC: Tensor, weight: Tensor, mean_TC: Tensor, invstd_TC: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of `step_norm.py`."""
    g_x_TBC = new_steps(x_TBC, x_TBC.dtype)
    g_weight_TC, g_bias_TC = torch.empty_like(mean_TC), torch.empty_like(mean_TC)
    for t, (g_BC, x_BC) in enumerate(zip(g_TBC, x_TBC, strict=True)):
        torch.ops.aten.native_batch_norm_backward.out(
            g_BC, x_BC, weight, None, None, mean_TC[t], invstd_TC[t], True, 0.0, [True] * 3,
            out0=g_x_TBC[t], out1=g_weight_TC[t], out2=g_bias_TC[t],
        )  # fmt: skip
    return g_x_TBC, g_weight_TC.sum(0), g_bias_TC.sum(0)


# -------------------------------------------------------------------------------------------- bits

# Numbers are compared and copied as integers of their size.
_INTEGERS = {2: np.int16, 4: np.int32, 8: np.int64}
_AS_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@saved
def _pack(first, end, count, x_at, bits_at, zero):
    x = carray(_pointer(x_at, zero), count)
    bits = carray(_pointer(bits_at, np.uint8(0)), (count + 7) // 8)
    for k in range(first, min(end, count // 8)):
        byte = np.uint8(0)
        for j in range(8):
            byte |= np.uint8(x[8 * k + j] != zero) << np.uint8(j)
        bits[k] = byte
    if end > count // 8 and count % 8:
        byte = np.uint8(0)
        for j in range(count % 8):
            byte |= np.uint8(x[count - count % 8 + j] != zero) << np.uint8(j)
        bits[count // 8] = byte


@saved
def _unpack(first, end, count, bits_at, x_at, height):
    x = carray(_pointer(x_at, height), count)
    bits = carray(_pointer(bits_at, np.uint8(0)), (count + 7) // 8)
    zero = height - height
    for k in range(first, min(end, count // 8)):
        byte = bits[k]
        for j in range(8):
            x[8 * k + j] = height if (byte >> np.uint8(j)) & np.uint8(1) else zero
    if end > count // 8:
        for i in range(count - count % 8, count):
            is_set = (bits[i // 8] >> np.uint8(i % 8)) & np.uint8(1)
            x[i] = height if is_set else zero


def pack_spikes(x: Tensor) -> Tensor:
    """`pack` of `packing.py`."""
    bits = torch.empty(-(-x.numel() // 8), dtype=torch.uint8)
    zero = _INTEGERS[x.element_size()](0)
    _in_threads(_pack, len(bits), x.numel(), x.numel(), x.data_ptr(), bits.data_ptr(), zero)
    return bits


def unpack_spikes(bits: Tensor, x: Tensor, height: float) -> None:
    """`unpack` of `packing.py`."""
    size = x.element_size()
    as_integer = torch.tensor(height, dtype=x.dtype).view(_AS_INTEGERS[size]).item()
    height_bits = _INTEGERS[size](as_integer)
    _in_threads(
        _unpack, len(bits), x.numel(), x.numel(), bits.data_ptr(), x.data_ptr(), height_bits
    )


# ---------------------------------------------------------------------------------------- max pool


@saved
def _max_pool(
    first, end, x_at, y_at, at_at, zero, small, height, width, pooled_h, pooled_w, size, size_w,
    stride, stride_w, padding, padding_w,
):  # fmt: skip
    """The pool of the images from `first` to `end`, each of one channel. `small` is a zero of the
    type of the positions.

    A row of the result is the maximum of columns, along which the loops are vector code, and then
    of columns side by side. Of equal numbers the first in the image is the maximum, as in torch.
    """
    x = carray(_pointer(x_at, zero), end * height * width)
    y = carray(_pointer(y_at, zero), end * pooled_h * pooled_w)
    at = carray(_pointer(at_at, small), end * pooled_h * pooled_w)
    padded = width + 2 * padding_w + stride_w
    best, best_at = np.full(padded, -np.inf, x.dtype), np.full(padded, 2**31 - 1, np.int32)
    most_at = np.empty(pooled_w, np.int32)
    inside, inside_at = best[padding_w : padding_w + width], best_at[padding_w : padding_w + width]
    for image in range(first, end):
        for row in range(pooled_h):
            top = max(row * stride - padding, 0)
            bottom = min(row * stride - padding + size, height)
            x_row = x[(image * height + top) * width :][:width]
            for i in range(width):
                inside[i] = x_row[i]
                inside_at[i] = np.int32(top * width + i)
            for r in range(top + 1, bottom):
                x_row = x[(image * height + r) * width :][:width]
                offset = np.int32(r * width)
                for i in range(width):
                    is_more = (x_row[i] > inside[i]) | (x_row[i] != x_row[i])
                    inside[i] = x_row[i] if is_more else inside[i]
                    inside_at[i] = offset + np.int32(i) if is_more else inside_at[i]
            begin = (image * pooled_h + row) * pooled_w
            most = y[begin : begin + pooled_w]
            for k in range(size_w):
                if stride_w == 1:  # a constant stride lets LLVM make vector code
                    _more(most, most_at, best[k:], best_at[k:], 1, k == 0)
                elif stride_w == 2:
                    _more(most, most_at, best[k:], best_at[k:], 2, k == 0)
                else:
                    _more(most, most_at, best[k:], best_at[k:], stride_w, k == 0)
            for i in range(pooled_w):
                at[begin + i] = most_at[i]


@compiled
def _more(most, most_at, x, x_at, stride, is_first):
    """Replace `most` by every `stride`-th number of `x` where that is more, or as much but earlier
    in the image.
    """
    if is_first:
        for i in range(len(most)):
            most[i] = x[i * stride]
            most_at[i] = x_at[i * stride]
    else:
        for i in range(len(most)):
            new, new_at = x[i * stride], x_at[i * stride]
            is_more = (new > most[i]) | (new != new) | ((new == most[i]) & (new_at < most_at[i]))
            most[i] = new if is_more else most[i]
            most_at[i] = new_at if is_more else most_at[i]


@saved
def _max_pool_backward(first, end, g_at, at_at, g_x_at, zero, small, pooled, pixels):
    g = carray(_pointer(g_at, zero), end * pooled)
    at = carray(_pointer(at_at, small), end * pooled)
    g_x = carray(_pointer(g_x_at, zero), end * pixels)
    for image in range(first, end):
        g_x_image = g_x[image * pixels : (image + 1) * pixels]
        g_x_image[:] = zero
        for i in range(image * pooled, (image + 1) * pooled):
            g_x_image[at[i]] += g[i]


def max_pool_forward(x_NCHW: Tensor, sizes: Sequence[int], is_small: bool) -> tuple[Tensor, Tensor]:
    """The forward of `max_pool.py`. `sizes`: kernel, stride and padding."""
    y_NCHW, at_NCHW = new_pooled(x_NCHW, sizes, is_small)
    _in_threads(
        _max_pool,
        x_NCHW.shape[:-2].numel(),
        x_NCHW.numel(),
        x_NCHW.data_ptr(),
        y_NCHW.data_ptr(),
        at_NCHW.data_ptr(),
        _DTYPES[x_NCHW.dtype](0),
        _POSITIONS[at_NCHW.dtype](0),
        *x_NCHW.shape[-2:],
        *y_NCHW.shape[-2:],
        *sizes,
        block=1,
    )
    return y_NCHW, at_NCHW


def max_pool_backward(g_NCHW: Tensor, at_NCHW: Tensor, height: int, width: int) -> Tensor:
    """The backward of `max_pool.py`."""
    g_x_NCHW = g_NCHW.new_empty(*g_NCHW.shape[:-2], height, width)
    _in_threads(
        _max_pool_backward,
        g_NCHW.shape[:-2].numel(),
        g_x_NCHW.numel(),
        g_NCHW.data_ptr(),
        at_NCHW.data_ptr(),
        g_x_NCHW.data_ptr(),
        _DTYPES[g_NCHW.dtype](0),
        _POSITIONS[at_NCHW.dtype](0),
        g_NCHW.shape[-2:].numel(),
        height * width,
        block=1,
    )
    return g_x_NCHW
