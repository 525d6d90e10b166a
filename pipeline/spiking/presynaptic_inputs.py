"""Who hears what the weight of a synapse multiplies: inputs of each step, traces, or rates, as rows
of numbers.
"""

# T time, B batch, N samples and time steps, C inputs of a synapse (of a convolution: the values of
# a patch)

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
    """Adds up what one synapse hears while `open_for` holds the number of steps T of the batch
    (`recording`).

    With `decay`, it hears the weighted mean over time in the place of each step.
    """

    def __init__(
        self,
        name: str,
        synapse: Linear | Conv2d,
        subspace: Subspace,
        moments: Callable[[Subspace], Moments],
        decay: float | None,
    ) -> None:
        self.name, self.synapse, self.subspace, self.moments, self.decay = (
            name,
            synapse,
            subspace,
            moments,
            decay,
        )
        self.open_for: int | None = None
        self.heard: Moments | None = None
        self.last: Moments | None = None
        """of the last batch, means over ranks"""

    @torch.no_grad()
    def record(self, x_TB: Tensor) -> None:
        """Raises: ValueError for a part of the sequence where the rates of all of it are asked
        for.
        """
        if self.open_for is None:
            return
        if self.decay is not None and len(x_TB) != self.open_for:
            raise ValueError(
                "HLOP: learn_from='rates' needs a rule that gives all T steps to the model at"
                f" once; got {len(x_TB)} of {self.open_for} steps at {self.name}"
            )
        if self.heard is None:
            self.heard = self.moments(self.subspace)
        with torch.autocast(x_TB.device.type, enabled=False), op_scope("lateral"):
            if is_static(x_TB):  # every mean over time is the frame
                x_TB = x_TB[:1]
            elif self.decay is not None:
                x_TB = torch.einsum(
                    "t,tb...->b...",
                    rate_weights(self.decay, x_TB),
                    x_TB.to(self.subspace.old.dtype),
                ).unsqueeze(0)
            for x_NC in factors(self.synapse, x_TB.to(self.subspace.old.dtype)):
                self.heard.add(x_NC)

    def energy(self) -> float:
        """The share of the last batch's energy that the rows keep; before the first batch, what the
        checkpoint says, or 0.
        """
        if self.last is not None:
            self.subspace.energy.copy_(self.last.energy(self.subspace))
        return float(self.subspace.energy)

    def bytes(self) -> int:
        """Of what it adds up in a batch, and what the last batch came to, which is there until
        then.
        """
        as_large = vars(self.moments(self.subspace)).values()
        return 2 * sum(each.nbytes for each in as_large if isinstance(each, Tensor))

    def forget(self) -> None:
        """What a batch that came to no end left behind."""
        self.heard = None

    def take(self, over_ranks: Callable[[Tensor], Tensor]) -> Moments | None:
        """The moments of a global batch, and a new beginning; None for a synapse that it did not
        pass. Collective.
        """
        heard, self.heard = self.heard, None
        if heard is not None:
            heard.mean(over_ranks)
            self.last = heard
        return heard


def recording(recorders: Sequence[InputRecorder], steps: int) -> AbstractContextManager[None]:
    """Inside, all of them record a batch of so many time steps."""
    return attribute_set(recorders, "open_for", steps)


class RecordedFactor:
    """The seam `presynaptic` with an recorder on the factor that it makes."""

    def __init__(self, seam: Callable[[Tensor], Tensor], record: Callable[[Tensor], None]) -> None:
        self.seam, self.record = seam, record
        self.state = getattr(seam, "state", None)

    def __call__(self, x_TB: Tensor) -> Tensor:
        factor_TB = self.seam(x_TB)
        self.record(factor_TB)
        return factor_TB


def factors(synapse: Linear | Conv2d, x_TB: Tensor) -> Iterator[Tensor]:
    """`[N, C]`: what each row of the weight is multiplied with; the patches of a convolution one
    time step after another.
    """
    if isinstance(synapse, Linear):
        yield x_TB.flatten(0, -2)
        return
    geometry = {"dilation": synapse.dilation, "padding": synapse.padding, "stride": synapse.stride}
    for x_BCHW in x_TB:
        patches_BCL = F.unfold(x_BCHW, synapse.kernel_size, **geometry)  # type: ignore[arg-type]
        yield patches_BCL.transpose(1, 2).flatten(0, 1)
