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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.spiking.encode import is_static, repeated_frame
from pipeline.spiking.kernels.operators import (
    define,
    dense,
    kernel,
    like,
    like_steps,
    membrane_dtype,
    new_step,
    new_steps,
)
from pipeline.spiking.surrogate import (
    ATan,
    FastSigmoid,
    Rectangle,
    Sigmoid,
    Surrogate,
    Triangle,
)

# u from the current c = x / beta and the membrane v: decay v + c, decay v + (1 - decay) c, or
# c + decay (v - c), which is torch.lerp.
ADDED, SCALED, INTERPOLATED = range(3)
TRIANGLE, SIGMOID, RECTANGLE, ATAN, FAST_SIGMOID = range(5)


class Constants(NamedTuple):
    """A neuron's numbers. `decay` is not used if the decay is learnt; None subtracts nothing: the
    reset is to zero. The neuron fires where u - threshold >= margin.
    """

    charge: int
    decay: float
    threshold: float
    margin: float
    subtract: float | None
    gain: float = 1.0
    beta: float = 1.0
    resets_first: bool = False  # the first membrane is u of the last step


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
    if type(surrogate) is FastSigmoid:
        return FAST_SIGMOID, surrogate.slope, 0.0
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

    If the membrane is cut after each call, and the backward keeps u of one step, then the last
    membrane is u, marked by `mark_before_reset`: no second tensor of that size is needed. A
    membrane that is cut overwrites the first one if no call with gradients has made or kept that:
    fresh memory costs a CPU more than the kernel.

    Args:
        v_B: the first membrane; None: 0.
        cut: whether the membrane is a constant between time steps. Then the last has no graph.
    """
    frame_B = repeated_frame(x_TB)
    x_TB, steps = dense(x_TB), len(x_TB)
    constants = constants._replace(resets_first=is_before_reset(v_B))
    v_B = None if v_B is None else like(v_B, x_TB)
    if cut and not torch.is_grad_enabled():
        overwritten_B = v_B if getattr(v_B, "may_be_overwritten", False) else None
        s_TB, end_B, _ = kernel("lif_forward", x_TB)(
            x_TB, v_B, learnt_decay, None, overwritten_B, *constants, False, overwritten_B is None
        )
        end_B = end_B if overwritten_B is None else overwritten_B
        end_B.may_be_overwritten = True  # type: ignore[attr-defined]
        return s_TB, end_B
    needs_backward = torch.is_grad_enabled() and any(
        each is not None and each.requires_grad for each in (x_TB, v_B, learnt_decay)
    )
    saves_u = needs_backward and not _inputs_are_smaller(x_TB, v_B)
    ends_in_u = saves_u and cut and len(x_TB) == 1
    if steps > 1 and frame_B is not None and is_static(x_TB):
        x_TB = frame_B.unsqueeze(0)  # the kernel sums the gradients of the steps
    s_TB, end_B = _Fused.apply(  # type: ignore[misc]
        *(x_TB, steps, v_B, learnt_decay, constants, surrogate, reset_gradient, cut),
        *(needs_backward, saves_u, ends_in_u),
    )
    return s_TB, mark_before_reset(end_B) if ends_in_u else end_B


def mark_before_reset(u_B: Tensor) -> Tensor:
    """`u_B`, marked as a membrane before the reset. The mark is an attribute of this object."""
    u_B.is_before_reset = True  # type: ignore[attr-defined]
    return u_B


def is_before_reset(v_B: Tensor | None) -> bool:
    return getattr(v_B, "is_before_reset", False)


@torch.no_grad()
def run_rates(
    x_TB: Tensor, v_B: Tensor | None, levels: Tensor, charge: int, decay: float
) -> tuple[Tensor, Tensor]:
    """The output and the last membrane of a rate neuron, without a graph.

    `levels` has the membrane at which it fires, what a spike subtracts, and the spike's height.
    """
    x_TB = dense(x_TB)
    v_B = None if v_B is None else like(v_B, x_TB)
    constants = Constants(charge, decay, threshold=0.0, margin=0.0, subtract=0.0)
    s_TB, end_B, _ = kernel("lif_forward", x_TB)(
        x_TB, v_B, None, levels, None, *constants, False, True
    )
    return s_TB, end_B


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TB: Tensor,
        steps: int,
        v_B: Tensor | None,
        learnt_decay: Tensor | None,
        constants: Constants,
        surrogate: tuple[int, float, float],
        reset_gradient: bool,
        cut: bool,
        needs_backward: bool,
        saves_u: bool,
        ends_in_u: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.is_one_frame = len(x_TB) < steps
        if ctx.is_one_frame:
            x_TB = x_TB.expand(steps, *x_TB.shape[1:])
        s_TB, end_B, u_TB = kernel("lif_forward", x_TB)(
            x_TB, v_B, learnt_decay, None, None, *constants, saves_u, not ends_in_u
        )
        end_B = u_TB[0] if ends_in_u else end_B
        ctx.set_materialize_grads(False)
        if cut:
            ctx.mark_non_differentiable(end_B)
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
        return s_TB, end_B

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("LIF: a spike has no second derivative; create_graph must be False")
        u_TB, x_TB, v_B, learnt_decay = ctx.saved_tensors
        kept = x_TB if u_TB is None else u_TB
        g_s_TB, g_v_B = grad_outputs
        needs_v = ctx.needs_input_grad[2]
        g_x_TB, g_v_B, g_decay = kernel("lif_backward", kept)(
            u_TB,
            x_TB,
            v_B,
            learnt_decay,
            None if g_s_TB is None else like_steps(g_s_TB, kept),
            None if g_v_B is None else like(g_v_B, kept),
            ctx.dtype,
            *ctx.arguments,
            needs_v,
            ctx.is_one_frame,
        )
        return g_x_TB, None, g_v_B, g_decay, *[None] * 7


def _inputs_are_smaller(x_TB: Tensor, v_B: Tensor | None) -> bool:
    """Whether the input and the first membrane take fewer bytes than u."""
    of_membrane = membrane_dtype(x_TB).itemsize
    frames = 1 if is_static(x_TB) else len(x_TB)
    inputs = frames * x_TB.element_size() + (0 if v_B is None else of_membrane)
    return inputs < len(x_TB) * of_membrane


def _fake_forward(x_TB: Tensor, *args: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dtype, (saves_u, needs_end) = membrane_dtype(x_TB), args[-2:]
    return (
        new_steps(x_TB, x_TB.dtype),
        new_step(x_TB, dtype) if needs_end else None,
        new_steps(x_TB, dtype) if saves_u else None,
    )


def _fake_backward(
    u_TB: Tensor | None, x_TB: Tensor | None, v_B: Any, learnt_decay: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    kept = x_TB if u_TB is None else u_TB
    assert kept is not None
    _, _, dtype, *_, needs_v, sums_steps = args
    g_v_B = new_step(kept, membrane_dtype(kept)) if needs_v else None
    g_decay = None if learnt_decay is None else torch.empty_like(learnt_decay)
    return new_steps(kept[:1] if sums_steps else kept, dtype), g_v_B, g_decay


_NEURON = (
    "int charge, float decay, float threshold, float margin, float? subtract, float gain,"
    " float beta, bool resets_first"
)
define(
    "lif_forward(Tensor x, Tensor? v, Tensor? learnt_decay, Tensor? levels, Tensor(a!)? end,"
    f" {_NEURON}, bool saves_u, bool needs_end) -> (Tensor, Tensor?, Tensor?)",
    _fake_forward,
)
define(
    "lif_backward(Tensor? u, Tensor? x, Tensor? v, Tensor? learnt_decay, Tensor? g_s, Tensor? g_v,"
    f" ScalarType dtype, {_NEURON}, int surrogate, float a, float b, bool reset_gradient, bool cut,"
    " bool needs_v, bool sums_steps) -> (Tensor, Tensor?, Tensor?)",
    _fake_backward,
)
