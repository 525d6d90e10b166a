"""The forward and the backward of a neuron over all time steps of a slice, one kernel each.

    s[t], v[t]   from x[t] / beta and v[t-1] (`spiking/neuron.py`); the spikes are `gain` s[t]

The kernels are numba's on a CPU (`cpu.py`) and Triton's on an NVIDIA GPU (`cuda.py`). Eager torch
is their reference, and runs where the package is missing. Spikes and membranes have its bits.
Gradients differ by the rounding of the surrogate's derivative.

The backward reads u, the membrane before the reset, at least in fp32. Where the input and the first
membrane take fewer bytes than u, the forward keeps them instead, and the backward computes u again.
"""

# T time, B batch

import math
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pipeline.spiking.surrogate import ATan, Rectangle, Sigmoid, Surrogate, Triangle

# u from the current c = x / beta and the membrane v: decay v + c, decay v + (1 - decay) c, or
# c + decay (v - c), which is torch.lerp.
ADDED, SCALED, INTERPOLATED = range(3)
TRIANGLE, SIGMOID, RECTANGLE, ATAN = range(4)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PACKAGES = {"cpu": "numba", "cuda": "triton"}


class Constants(NamedTuple):
    """A neuron's numbers. `decay` is not used if the decay is learnt; None subtracts nothing: the
    reset is to zero.
    """

    charge: int
    decay: float
    threshold: float
    subtract: float | None
    gain: float = 1.0
    beta: float = 1.0


def has_kernel(x: Tensor) -> bool:
    """Whether there are kernels for the device and dtype of `x`. They count on fake tensors too."""
    if x.dtype not in _DTYPES:
        return False
    return isinstance(x, FakeTensor) or x.is_meta or _is_installed(_PACKAGES.get(x.device.type))


@cache
def _is_installed(package: str | None) -> bool:
    return package is not None and find_spec(package) is not None


def surrogate_constants(surrogate: Surrogate) -> tuple[int, float, float] | None:
    """The number of a surrogate and two constants of its derivative; None if it has no kernel."""
    # A subclass may have another derivative.
    if type(surrogate) is Triangle:
        return TRIANGLE, surrogate.alpha, surrogate.alpha**2
    if type(surrogate) is Sigmoid:
        return SIGMOID, surrogate.alpha, 0.0
    if type(surrogate) is Rectangle:
        return RECTANGLE, surrogate.alpha / 2, 1 / surrogate.alpha
    if type(surrogate) is ATan:
        return ATAN, math.pi / 2 * surrogate.alpha, surrogate.alpha / 2
    return None


def run(
    x_TB: Tensor,
    v_B: Tensor | None,
    learnt_decay: Tensor | None,
    constants: Constants,
    surrogate: tuple[int, float, float],
    *,
    reset_gradient: bool,
    cut: bool,
) -> tuple[Tensor, Tensor]:
    """The spikes `[T, B, ...]` in the dtype of `x_TB`, and the last membrane.

    Args:
        v_B: the first membrane; None: 0.
        cut: whether the membrane is a constant between time steps. Then the last has no graph.
    """
    x_TB = _dense(x_TB)
    v_B = None if v_B is None else _like(v_B, x_TB)
    needs_backward = torch.is_grad_enabled() and any(
        each is not None and each.requires_grad for each in (x_TB, v_B, learnt_decay)
    )
    return _Fused.apply(  # type: ignore[return-value]
        x_TB, v_B, learnt_decay, constants, surrogate, reset_gradient, cut, needs_backward
    )


@torch.no_grad()
def run_rates(
    x_TB: Tensor, v_B: Tensor | None, levels: Tensor, charge: int, decay: float
) -> tuple[Tensor, Tensor]:
    """The output and the last membrane of a rate neuron, without a graph.

    `levels` has the membrane at which it fires, what a spike subtracts, and the spike's height.
    """
    x_TB = _dense(x_TB)
    v_B = None if v_B is None else _like(v_B, x_TB)
    constants = Constants(charge, decay, threshold=0.0, subtract=0.0)
    s_TB, v_end_B, _ = _kernel(x_TB, "forward")(x_TB, v_B, None, levels, *constants, False)
    return s_TB, v_end_B


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TB: Tensor,
        v_B: Tensor | None,
        learnt_decay: Tensor | None,
        constants: Constants,
        surrogate: tuple[int, float, float],
        reset_gradient: bool,
        cut: bool,
        needs_backward: bool,
    ) -> tuple[Tensor, Tensor]:
        saves_u = needs_backward and not _inputs_are_smaller(x_TB, v_B)
        s_TB, v_end_B, u_TB = _kernel(x_TB, "forward")(
            x_TB, v_B, learnt_decay, None, *constants, saves_u
        )
        ctx.set_materialize_grads(False)
        if cut:
            ctx.mark_non_differentiable(v_end_B)
        if needs_backward:
            reads_v = not saves_u or learnt_decay is not None
            reads_x = not saves_u or (reads_v and constants.charge == INTERPOLATED)
            ctx.save_for_backward(
                u_TB if saves_u else None,
                x_TB if reads_x else None,
                v_B if reads_v else None,
                learnt_decay,
            )
        ctx.arguments = (*constants, *surrogate, reset_gradient, cut)
        ctx.dtype = x_TB.dtype
        return s_TB, v_end_B

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("LIF: a spike has no second derivative; create_graph must be False")
        u_TB, x_TB, v_B, learnt_decay = ctx.saved_tensors
        like = x_TB if u_TB is None else u_TB
        g_s_TB, g_v_B = grad_outputs
        _, needs_v, *_ = ctx.needs_input_grad
        g_x_TB, g_v_B, g_decay = _kernel(like, "backward")(
            u_TB,
            x_TB,
            v_B,
            learnt_decay,
            None if g_s_TB is None else _like_steps(g_s_TB, like),
            None if g_v_B is None else _like(g_v_B, like),
            ctx.dtype,
            *ctx.arguments,
            needs_v,
        )
        return g_x_TB, g_v_B, g_decay, *[None] * 5


def _inputs_are_smaller(x_TB: Tensor, v_B: Tensor | None) -> bool:
    """Whether the input and the first membrane take fewer bytes than u."""
    of_membrane = torch.promote_types(x_TB.dtype, torch.float32).itemsize
    inputs = len(x_TB) * x_TB.element_size() + (0 if v_B is None else of_membrane)
    return inputs < len(x_TB) * of_membrane


def _dense(x_TB: Tensor) -> Tensor:
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


def _like(v_B: Tensor, x_TB: Tensor) -> Tensor:
    """`v_B` in the order of memory of a time step of `x_TB`."""
    strides = x_TB.stride()[1:]
    if v_B.stride() == strides:
        return v_B
    return torch.empty_strided(v_B.shape, strides, dtype=v_B.dtype, device=v_B.device).copy_(v_B)


def _like_steps(g_TB: Tensor, x_TB: Tensor) -> Tensor:
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


# ---------------------------------------------------------------------------------------- operators

# torch's operators, so that what counts kernels and bytes sees one kernel each.
_library = torch.library.Library("spiketrain", "DEF")
_NEURON = "int charge, float decay, float threshold, float? subtract, float gain, float beta"
_library.define(
    "lif_forward(Tensor x, Tensor? v, Tensor? learnt_decay, Tensor? levels,"
    f" {_NEURON}, bool saves_u) -> (Tensor, Tensor, Tensor?)"
)
_library.define(
    "lif_backward(Tensor? u, Tensor? x, Tensor? v, Tensor? learnt_decay, Tensor? g_s, Tensor? g_v,"
    f" ScalarType dtype, {_NEURON}, int surrogate, float a, float b, bool reset_gradient, bool cut,"
    " bool needs_v) -> (Tensor, Tensor?, Tensor?)"
)
_module = cache(import_module)  # with the first call


def _kernel(x: Tensor, name: str) -> Any:
    """A kernel for the device of `x`. torch's dispatcher takes as long as a small kernel, so it is
    asked only if something observes operations.
    """
    if isinstance(x, FakeTensor) or x.is_meta or torch._C._len_torch_dispatch_stack():
        return getattr(torch.ops.spiketrain, f"lif_{name}").default
    return getattr(_module(f"pipeline.spiking.kernels.{x.device.type}"), name)


for _device in _PACKAGES:
    for _name in ("forward", "backward"):
        _library.impl(
            f"lif_{_name}",
            lambda *args, module=f"pipeline.spiking.kernels.{_device}", name=_name: getattr(
                _module(module), name
            )(*args),
            _device.upper(),
        )


@torch.library.register_fake("spiketrain::lif_forward", lib=_library)
def _(x_TB: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = torch.promote_types(x_TB.dtype, torch.float32)
    u_TB = new_steps(x_TB, dtype) if args[-1] else None
    return new_steps(x_TB, x_TB.dtype), new_step(x_TB, dtype), u_TB


@torch.library.register_fake("spiketrain::lif_backward", lib=_library)
def _(
    u_TB: Tensor | None, x_TB: Tensor | None, v_B: Any, learnt_decay: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    like = x_TB if u_TB is None else u_TB
    assert like is not None
    _, _, dtype, *_, needs_v = args
    g_v_B = new_step(like, torch.promote_types(like.dtype, torch.float32)) if needs_v else None
    g_decay = None if learnt_decay is None else torch.empty_like(learnt_decay)
    return new_steps(like, dtype), g_v_B, g_decay
