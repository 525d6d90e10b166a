"""The layers before the first neuron, computed once for a static input.

A call on several steps of a static input (`encode.is_static`) computes them once. Slices of a batch
share the result of the first slice (`slice_cache.py`). With a `presynaptic` seam, whose factor
changes from step to step, they are computed at each step.
"""

# T time, B batch

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from pipeline.spiking.encode import is_static, repeat
from pipeline.spiking.norm import repeated_steps
from pipeline.spiking.slice_cache import SliceCache
from pipeline.spiking.state import State


class StaticInput(nn.Sequential):
    """Stateless layers before the first neuron, such as synapse, norm and pool.

    The running statistics are updated at the first slice, by as much as all T steps would update
    them.
    """

    def __init__(self, *modules: Any) -> None:
        super().__init__(*modules)
        self.slice_cache: SliceCache | None = None
        self.state = State("StaticInput")

    @classmethod
    def of(cls, sequence: nn.Sequential) -> "StaticInput":
        """A StaticInput with the modules of `sequence` under the same names."""
        return cls(OrderedDict(sequence.named_children()))

    def forward(self, input: Tensor) -> Tensor:
        cache = self.slice_cache
        if (
            cache is None
            or not _is_slice_of_static_frame(input, cache)
            or self._has_presynaptic_seam
        ):
            return super().forward(input)

        def compute() -> Tensor:
            with repeated_steps(self, cache.steps):
                return super(StaticInput, self).forward(input)[0]

        return repeat(cache.once(self.state, compute), len(input))

    @property
    def _has_presynaptic_seam(self) -> bool:
        return any(getattr(module, "presynaptic", None) is not None for module in self.modules())


def _is_slice_of_static_frame(x_TB: Tensor, cache: SliceCache) -> bool:
    """Whether `x_TB` is a slice of the batch's static frame. The frame is kept alive so that its
    storage is not reused.
    """
    if not is_static(x_TB) or len(x_TB) == cache.steps:
        return False
    if cache.frame_B is None:
        cache.frame_B = x_TB[0]
    return _storage(x_TB) == _storage(cache.frame_B) and x_TB.shape[1:] == cache.frame_B.shape


def _storage(x: Tensor) -> tuple[int, int]:
    """Storage and offset; not the address, which a meta tensor lacks."""
    # torch's stub says Tensor
    return x.untyped_storage()._cdata, x.storage_offset()  # type: ignore[return-value]
