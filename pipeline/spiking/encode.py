"""Inputs with a time axis: repeated images, or the frames of recordings."""

# T time, B batch, C channels, H W pixels

from torch import Tensor

from pipeline.core.checks import refuse_unless_counts, require
from pipeline.spiking.kernels.operators import dense


def to_time_first(x_B: Tensor, steps: int) -> Tensor:
    """A batch `x_B` of a data set, time first: `[T, B, C, H, W]` with T = `steps`.

    Images `[B, C, H, W]` are repeated. Recordings `[B, T, C, H, W]` are transposed.

    Raises: ValueError for another shape, or recordings with a length other than `steps`.
    """
    if x_B.dim() == 4:
        return repeat(x_B, steps)
    require(
        x_B.dim() == 5 and x_B.shape[1] == steps,
        f"to_time_first: a sample must be an image [C, H, W] or {steps} frames [T, C, H, W]; got"
        f" {tuple(x_B.shape[1:])}",
    )
    return dense(x_B.transpose(0, 1))


def repeat(x_B: Tensor, steps: int) -> Tensor:
    """The frame `x_B` at each of `steps` time steps, as a view `[T, B, ...]` without a copy.

    Raises: ValueError for fewer than one step.
    """
    refuse_unless_counts("repeat", {"steps": steps})
    x_TB = x_B.unsqueeze(0).expand(steps, *x_B.shape)
    x_TB.frame_B = x_B  # type: ignore[attr-defined]  # of this tensor object, not of its slices
    return x_TB


def frame_of(x_TB: Tensor) -> Tensor:
    """The frame of a static input.

    For the result of `repeat` it is the repeated tensor. The backward of `x_TB[0]` would fill a
    tensor of all steps with zeros, and sum it.
    """
    frame_B = repeated_frame(x_TB)
    return x_TB[0] if frame_B is None else frame_B


def repeated_frame(x_TB: Tensor) -> Tensor | None:
    """The frame of a result of `repeat`; None for another tensor, or if the gradient of `x_TB`
    itself is asked for.
    """
    is_leaf = x_TB.requires_grad and x_TB.grad_fn is None
    return None if is_leaf else getattr(x_TB, "frame_B", None)


def is_static(x_TB: Tensor) -> bool:
    """Whether all time steps are one frame in memory, as in the result of `repeat` for T > 1.

    Slices along T are static too. Equal frames in separate memory are not static. For a static
    input, the stateless layers of `pipeline.spiking` compute one step and return a static view.
    """
    return x_TB.stride(0) == 0
