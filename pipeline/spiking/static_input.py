"""What stands before the first neuron, computed once for a still image, however many slices of time
steps read it.

A call on several steps of a still image computes them once as it is (`encode.is_static`); slices
share what the first of them computed (`once.py`). A synapse whose `presynaptic` gives another
factor at each step is computed at each step."""

# T time, B batch

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from pipeline.spiking.encode import is_static, repeat
from pipeline.spiking.norm import repeated_steps
from pipeline.spiking.slice_cache import SliceCache
from pipeline.spiking.state import State


class StaticInput(nn.Sequential):
    """Synapse, norm, pool and the like before the first neuron, as at the head of the file; nothing
    in it remembers or draws.

    Its running statistics move at the first slice, as far as all T steps move them.
    """

    def __init__(self, *modules: Any) -> None:
        super().__init__(*modules)
        self.slice_cache: SliceCache | None = None
        self.state = State("StaticInput")

    @classmethod
    def of(cls, sequence: nn.Sequential) -> "StaticInput":
        """The same modules under the same names."""
        return cls(OrderedDict(sequence.named_children()))

    def forward(self, input: Tensor) -> Tensor:
        cache = self.slice_cache
        if cache is None or not _is_slice_of_the_image(input, cache) or self._factors_differ:
            return super().forward(input)

        def compute() -> Tensor:
            with repeated_steps(self, cache.steps):
                return super(StaticInput, self).forward(input)[0]

        return repeat(cache.once(self.state, compute), len(input))

    @property
    def _factors_differ(self) -> bool:
        return any(getattr(module, "presynaptic", None) is not None for module in self.modules())


def _is_slice_of_the_image(x_TB: Tensor, cache: SliceCache) -> bool:
    """The image is held, so that no other storage takes its place."""
    if not is_static(x_TB) or len(x_TB) == cache.steps:
        return False
    if cache.image_B is None:
        cache.image_B = x_TB[0]
    return _place(x_TB) == _place(cache.image_B) and x_TB.shape[1:] == cache.image_B.shape


def _place(x: Tensor) -> tuple[int, int]:
    """Storage and offset; a tensor without values, as a forecast counts with, has no address."""
    # torch's stub says Tensor
    return x.untyped_storage()._cdata, x.storage_offset()  # type: ignore[return-value]
