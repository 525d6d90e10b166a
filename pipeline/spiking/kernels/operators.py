"""torch operators whose kernels are numba's on a CPU and Triton's on an NVIDIA GPU.

    define("name(Tensor x) -> Tensor", fake)      declares spiketrain::name
    kernel("name", x)                             its kernel for the device of x, to be called

The kernels are functions of that name in `cpu.py` and `cuda.py`. They take dense tensors: time
steps that are dense in memory and follow one another, or one step for a static input.
"""

# T time, B batch

import math
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PACKAGES = {"cpu": "numba", "cuda": "triton"}
_library = torch.library.Library("spiketrain", "DEF")
_import = cache(import_module)  # with the first call


def has_kernels(x: Tensor) -> bool:
    """Whether there are kernels for the device and the dtype of `x`.

    There are on fake and meta tensors, which stand for those of a GPU. There are none in programs
    of `torch.export`, which run without spiketrain.
    """
    has_dtype = x.dtype in _DTYPES and not (x.is_cuda and x.dtype == torch.float64)
    if not has_dtype or torch.compiler.is_exporting():
        return False
    return isinstance(x, FakeTensor) or x.is_meta or _is_installed(_PACKAGES.get(x.device.type))


def kernels_of(device: torch.device) -> str:
    """The package of the kernels for a device; "eager": there are none, and torch computes."""
    package = _PACKAGES.get(device.type)
    return package if package is not None and _is_installed(package) else "eager"


@cache
def _is_installed(package: str | None) -> bool:
    return package is not None and find_spec(package) is not None


def define(schema: str, fake: Callable[..., Any]) -> None:
    """Declare an operator. `fake` returns its results without their values."""
    name = _library.define(schema)
    for device in _PACKAGES:
        _library.impl(name, lambda *args, at=device: _function(name, at)(*args), device.upper())
    torch.library.register_fake(f"spiketrain::{name}", fake, lib=_library)


def kernel(name: str, x: Tensor) -> Callable[..., Any]:
    """The kernel `name` for the device of `x`.

    torch's dispatcher takes as long as a small kernel, so it is called only if something observes
    operations.
    """
    if isinstance(x, FakeTensor) or x.is_meta or torch._C._len_torch_dispatch_stack():
        return getattr(torch.ops.spiketrain, name).default
    return _function(name, x.device.type)


def _function(name: str, device: str) -> Callable[..., Any]:
    function = getattr(_import(f"pipeline.spiking.kernels.{device}"), name)
    return function if device == "cpu" else partial(_on_its_gpu, function)


def _on_its_gpu(function: Callable[..., Any], *args: Any) -> Any:
    """Call with the GPU of the tensors as the current one, on which Triton launches kernels."""
    with torch.cuda.device_of(next(each for each in args if each is not None)):
        return function(*args)


# --------------------------------------------------------------------------------- order of memory


def dense(x_TB: Tensor) -> Tensor:
    """`x_TB`, with time steps that are dense in memory, one after another; or one, if it is static.

    Channels may come last in memory.
    """
    if x_TB.is_contiguous():
        return x_TB
    x_B = x_TB.detach()[0]
    is_dense = x_B.is_contiguous() or (
        x_B.dim() == 4 and x_B.is_contiguous(memory_format=torch.channels_last)
    )
    follows = len(x_TB) == 1 or x_TB.stride(0) in (0, x_B.numel())
    return x_TB if is_dense and follows else x_TB.contiguous()


def like(v_B: Tensor, x_TB: Tensor) -> Tensor:
    """`v_B` in the order of memory of a time step of `x_TB`."""
    strides = x_TB.stride()[1:]
    if v_B.stride() == strides:
        return v_B
    return torch.empty_strided(v_B.shape, strides, dtype=v_B.dtype, device=v_B.device).copy_(v_B)


def like_steps(g_TB: Tensor, x_TB: Tensor) -> Tensor:
    strides, distances = x_TB.stride()[1:], (0, math.prod(x_TB.shape[1:]))
    if g_TB.stride()[1:] == strides and (len(g_TB) == 1 or g_TB.stride(0) in distances):
        return g_TB
    return new_steps(x_TB, g_TB.dtype).copy_(g_TB)


def new_steps(x_TB: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor of the shape of `x_TB`, with its order of memory within a time step."""
    if x_TB.is_contiguous():
        return torch.empty_like(x_TB, dtype=dtype)
    strides = (math.prod(x_TB.shape[1:]), *x_TB.stride()[1:])
    return torch.empty_strided(x_TB.shape, strides, dtype=dtype, device=x_TB.device)


def new_step(x_TB: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor for one time step of `x_TB`."""
    return torch.empty_strided(x_TB.shape[1:], x_TB.stride()[1:], dtype=dtype, device=x_TB.device)


def time_stride(x_TB: Tensor | None) -> int:
    """The distance between time steps in memory; 0 for a static input, or none."""
    return 0 if x_TB is None or len(x_TB) == 1 else x_TB.stride(0)


def membrane_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a membrane for the currents `x`: at least fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
