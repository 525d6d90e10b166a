"""Spikes as bits: what a synapse keeps of its input for the gradient of its weights.

A neuron's output is 0 or one height, so one bit a spike and the height are enough. A neuron marks
its output (`mark_spikes`); the mark is an attribute of that tensor object, so that no operation on
it has the mark. Values are never inspected.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.spiking.kernels.operators import define, has_kernels, kernel

_BITS = 8  # of a byte


def mark_spikes(s_TB: Tensor, height: float) -> Tensor:
    """`s_TB`, marked as the output of neurons whose spikes have this height."""
    s_TB.spike_height = height  # type: ignore[attr-defined]
    return s_TB


def height_of(x_TB: Tensor) -> float | None:
    """The height of the spikes in `x_TB`; None: not marked as spikes."""
    return getattr(x_TB, "spike_height", None)


def pack(x: Tensor) -> Tensor:
    """One bit for each number of a dense tensor, in the order of memory: whether it is not 0."""
    if has_kernels(x):
        return kernel("pack_spikes", x)(x)
    numbers = x.as_strided((x.numel(),), (1,)) != 0
    padded = torch.nn.functional.pad(numbers, (0, -len(numbers) % _BITS)).view(-1, _BITS)
    return (padded << torch.arange(_BITS, device=x.device)).sum(1, dtype=torch.uint8)


def unpack(
    bits: Tensor, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, height: float
) -> Tensor:
    """The tensor of this shape and order of memory whose numbers `pack` has packed."""
    x = torch.empty_strided(shape, strides, dtype=dtype, device=bits.device)
    if has_kernels(x):
        kernel("unpack_spikes", x)(bits, x, height)
        return x
    numbers = (bits.unsqueeze(1) >> torch.arange(_BITS, device=bits.device)) & 1
    x.as_strided((x.numel(),), (1,)).copy_(numbers.flatten()[: x.numel()]).mul_(height)
    return x


def _fake_pack(x: Tensor) -> Any:
    return x.new_empty(-(-x.numel() // _BITS), dtype=torch.uint8)


define("pack_spikes(Tensor x) -> Tensor", _fake_pack)
define("unpack_spikes(Tensor bits, Tensor(a!) x, float height) -> ()", lambda bits, x, height: None)
