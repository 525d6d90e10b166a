"""Recording of presynaptic inputs: the factors that a synapse's weight gradient multiplies, as
rows.
"""

# T time, B batch, N samples and time steps, C inputs of a synapse (for a convolution: of a patch)

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.spiking.encode import is_static
from pipeline.spiking.op_scope import op_scope
from pipeline.spiking.rate import rate_weights
from pipeline.spiking.state import attribute_set
from pipeline.spiking.subspace import Moments, Subspace
from pipeline.spiking.synapse import Conv2d, Linear


class InputRecorder:
    """Accumulates moments of one synapse's inputs, for one subspace, while `recording` is active.

    The inputs are the values of each step, or with `decay` their weighted mean over time. `steps`
    is the number of time steps of the batch while recording, else None.
    """

    def __init__(
        self,
        name: str,
        synapse: Linear | Conv2d,
        subspace: Subspace,
        moments: Callable[[Subspace], Moments],
        decay: float | None,
    ) -> None:
        self.name, self.synapse, self.subspace = name, synapse, subspace
        self.moments, self.decay = moments, decay
        self.steps: int | None = None
        self.pending: Moments | None = None
        self.last: Moments | None = None
        """the moments of the last global batch"""

    @torch.no_grad()
    def record(self, x_TB: Tensor) -> None:
        """Add the inputs `x_TB` to the moments.

        Raises: ValueError if a mean over time is needed and `x_TB` is only a part of the sequence.
        """
        if self.steps is None:
            return
        if self.decay is not None and len(x_TB) != self.steps:
            raise ValueError(
                "HLOP: learn_from='rates' needs a rule that gives all T steps to the model at"
                f" once; got {len(x_TB)} of {self.steps} steps at {self.name}"
            )
        if self.pending is None:
            self.pending = self.moments(self.subspace)
        with torch.autocast(x_TB.device.type, enabled=False), op_scope("lateral"):
            if is_static(x_TB):  # the mean over time is the frame itself
                x_TB = x_TB[:1]
            elif self.decay is not None:
                x_TB = torch.einsum(
                    "t,tb...->b...",
                    rate_weights(self.decay, x_TB),
                    x_TB.to(self.subspace.old.dtype),
                ).unsqueeze(0)
            for x_NC in input_rows(self.synapse, x_TB.to(self.subspace.old.dtype)):
                self.pending.add(x_NC)

    def energy(self) -> float:
        """The share of the inputs' energy in the last batch that the rows keep; before the first
        batch the checkpoint's value, or 0.
        """
        if self.last is not None:
            self.subspace.energy.copy_(self.last.energy(self.subspace))
        return float(self.subspace.energy)

    def bytes(self) -> int:
        """Bytes of the moments of the current batch and of the last one."""
        as_large = vars(self.moments(self.subspace)).values()
        return 2 * sum(each.nbytes for each in as_large if isinstance(each, Tensor))

    def discard(self) -> None:
        """Discard the moments of an unfinished batch."""
        self.pending = None

    def finish(self, over_ranks: Callable[[Tensor], Tensor]) -> Moments | None:
        """The moments of a global batch, averaged over ranks, and a new start. Collective. None if
        the batch did not pass this synapse.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.mean(over_ranks)
            self.last = pending
        return pending


def recording(recorders: Sequence[InputRecorder], steps: int) -> AbstractContextManager[None]:
    """Inside, all `recorders` record a batch of `steps` time steps."""
    return attribute_set(recorders, "steps", steps)


class RecordedFactor:
    """A `presynaptic` seam that also passes its factor to a recorder."""

    def __init__(self, seam: Callable[[Tensor], Tensor], record: Callable[[Tensor], None]) -> None:
        self.seam, self.record = seam, record
        self.state = getattr(seam, "state", None)

    def __call__(self, x_TB: Tensor) -> Tensor:
        factor_TB = self.seam(x_TB)
        self.record(factor_TB)
        return factor_TB


def input_rows(synapse: Linear | Conv2d, x_TB: Tensor) -> Iterator[Tensor]:
    """Blocks `[N, C]` of the inputs that each row of the weight multiplies; for a convolution the
    patches of one time step after another.
    """
    if isinstance(synapse, Linear):
        yield x_TB.flatten(0, -2)
        return
    geometry = {"dilation": synapse.dilation, "padding": synapse.padding, "stride": synapse.stride}
    for x_BCHW in x_TB:
        patches_BCL = F.unfold(x_BCHW, synapse.kernel_size, **geometry)  # type: ignore[arg-type]
        yield patches_BCL.transpose(1, 2).flatten(0, 1)
