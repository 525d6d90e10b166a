"""Inputs with a time axis: repeated images and recorded frames."""

# T time, B batch, C channels, H W pixels

from torch import Tensor

from pipeline.core.checks import refuse_unless_counts, require


def over_steps(x_B: Tensor, steps: int) -> Tensor:
    """A data-set batch with time first.

    Images `[B, C, H, W]` are repeated, recordings `[B, T, C, H, W]` are transposed.

    Raises: ValueError for recordings whose length is not `steps`.
    """
    if x_B.dim() == 4:
        return repeat(x_B, steps)
    require(
        x_B.dim() == 5 and x_B.shape[1] == steps,
        f"over_steps: a sample must be an image [C, H, W] or {steps} frames [T, C, H, W]; got"
        f" {tuple(x_B.shape[1:])}",
    )
    return x_B.transpose(0, 1).contiguous()


def repeat(x_B: Tensor, steps: int) -> Tensor:
    """The same frame at each of `steps` time steps: `[B, ...]` to a view `[T, B, ...]`, without a
    copy.

    Raises: ValueError for fewer than one step.
    """
    refuse_unless_counts("repeat", {"steps": steps})
    return x_B.unsqueeze(0).expand(steps, *x_B.shape)


def is_static(x_TB: Tensor) -> bool:
    """Whether all time steps are one frame in memory, as `repeat` makes them.

    Slices along T stay static. Equal frames in separate memory are not static. `folded` and the
    layers of `pipeline.spiking` compute a static input once and return a static view.
    """
    return x_TB.stride(0) == 0
