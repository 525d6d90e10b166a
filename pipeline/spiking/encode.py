"""From data to the time axis."""

# T time, B batch, C channels, H W pixels

from torch import Tensor

from pipeline.core.checks import refuse_unless_counts


def over_steps(x_B: Tensor, steps: int) -> Tensor:
    """A batch of a data set, time first: still images `[B, C, H, W]` repeated, recordings `[B, T,
    C, H, W]` as they are.

    Raises: ValueError for recordings of another length than `steps`.
    """
    if x_B.dim() == 4:
        return repeat(x_B, steps)
    if x_B.dim() != 5 or x_B.shape[1] != steps:
        raise ValueError(
            f"over_steps: a sample must be an image [C, H, W] or {steps} frames [T, C, H, W]; got"
            f" {tuple(x_B.shape[1:])}"
        )
    return x_B.transpose(0, 1).contiguous()


def repeat(x_B: Tensor, steps: int) -> Tensor:
    """The same frame at each of `steps` time steps: `[B, ...]` to `[T, B, ...]`, a view that copies
    nothing.

    Raises: ValueError for fewer than one step.
    """
    refuse_unless_counts("repeat", {"steps": steps})
    return x_B.unsqueeze(0).expand(steps, *x_B.shape)


def is_static(x_TB: Tensor) -> bool:
    """Whether all time steps are one frame, as `repeat` makes them; slices along T stay so, and
    frames that are equal are not.

    What maps each step by itself then maps one frame: `folded` and the layers of `pipeline.spiking`
    do, and hand on a view."""
    return x_TB.stride(0) == 0
