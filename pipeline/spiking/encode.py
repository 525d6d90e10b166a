"""From data to the time axis."""

# T time, B batch, C channels, H W pixels

from torch import Tensor


def repeat(x_BCHW: Tensor, steps: int) -> Tensor:
    """The same frame at each of `steps` time steps: `[B, C, H, W]` to `[T, B, C, H, W]`, a view that copies nothing.

    Raises: ValueError for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"repeat: steps must be >= 1; got steps={steps}")
    return x_BCHW.unsqueeze(0).expand(steps, *x_BCHW.shape)
