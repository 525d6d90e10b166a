"""What stands before the first neuron, computed once for a still image, however many slices of time steps read it.

A call on several steps of a still image computes them once as it is (`encode.is_still`). A rule that gives the model one slice
after another opens `images_computed_once` around them, and says so where one slice is the last that it differentiates:

    y = first(image)                            at the first slice, with its graph if any slice learns
    slice t reads a copy of y without a graph, which collects the gradient of its backward: G = sum_t dL[t]/dy
    the last slice reads y itself; to the gradient that comes back, G is added, and the sum goes on into `first`

So `first` has one forward and one backward a batch, and no backward call is added. All gradients of a micro-batch carry the
same factor (its share, a loss scale), so G does.

It is exact where each slice's gradient is linear in dL[t]/dy with one factor for all t, and the weights rest meanwhile. A synapse
whose `presynaptic` gives another factor at each step is computed at each step.
"""

# T time, B batch

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.spiking.encode import is_still, repeat
from pipeline.spiking.norm import standing_for
from pipeline.spiking.state import State

Backwards = Literal["one", "several"]


class Sharing:
    """What the slices of one batch have in common.

    `backwards`: whether one backward call goes through all of them, or several through each or some.
    """

    def __init__(self, *, steps: int, backwards: Backwards) -> None:
        self.steps = steps
        self.backwards: Backwards = backwards
        self.is_last = False
        """whether the slice at hand is the last that is differentiated; a rule of several backward calls sets it"""
        self.learns = torch.is_grad_enabled()
        self._image_B: Tensor | None = None

    def covers(self, x_TB: Tensor) -> bool:
        """Whether `x_TB` is a slice of the batch's image. The image is held, so that nothing else gets its address."""
        if not is_still(x_TB) or len(x_TB) == self.steps:
            return False
        if self._image_B is None:
            self._image_B = x_TB[0]
        return x_TB.data_ptr() == self._image_B.data_ptr() and x_TB.shape[1:] == self._image_B.shape


class OncePerImage(nn.Sequential):
    """Synapse, norm, pool and the like before the first neuron, as at the head of the file; nothing in it remembers or draws.

    Its running statistics move at the first slice, as far as all T steps move them.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.sharing: Sharing | None = None
        self.state = State("OncePerImage")

    @classmethod
    def of(cls, sequence: nn.Sequential) -> "OncePerImage":
        """The same modules under the same names."""
        first = cls()
        for name, module in sequence.named_children():
            first.add_module(name, module)
        return first

    def forward(self, input: Tensor) -> Tensor:
        sharing = self.sharing
        if sharing is None or not sharing.covers(input) or self._factors_differ:
            return super().forward(input)
        y_B = self.state.read("y")
        if y_B is None:
            y_B = self._computed(input, sharing)
            self.state.write("y", y_B)
        if y_B.requires_grad and torch.is_grad_enabled() and sharing.backwards == "several" and not sharing.is_last:
            y_B = self._without_graph(y_B)
        return repeat(y_B, len(input))

    @property
    def _factors_differ(self) -> bool:
        return any(getattr(module, "presynaptic", None) is not None for module in self.modules())

    def _computed(self, x_cB: Tensor, sharing: Sharing) -> Tensor:
        # A slice that does not learn may come before one that does; one backward through all slices finds one mode for all.
        with_graph = torch.is_grad_enabled() if sharing.backwards == "one" else sharing.learns
        with torch.set_grad_enabled(with_graph), standing_for(self, sharing.steps):
            y_B = super().forward(x_cB)[0]
        if y_B.requires_grad and sharing.backwards == "several":
            y_B.register_hook(self._with_what_was_collected)
        return y_B

    def _without_graph(self, y_B: Tensor) -> Tensor:
        """A copy of y, on which the gradients of several backward calls add up."""
        copy_B = self.state.read("copy")
        if copy_B is None:
            # Never below fp32, as the gradients of the weights are not that it stands for.
            copy_B = y_B.detach().to(torch.promote_types(y_B.dtype, torch.float32)).requires_grad_()
            # Made here, and added to in place, so that it is among what the network remembers, and counted.
            copy_B.grad = torch.zeros_like(copy_B)
            self.state.write("copy", copy_B)
            self.state.write("gradient", copy_B.grad)
        return copy_B.to(y_B.dtype)

    def _with_what_was_collected(self, g_B: Tensor) -> Tensor:
        """The gradient of y in its one backward."""
        collected_B = self.state.read("gradient")
        return g_B if collected_B is None else (g_B + collected_B).to(g_B.dtype)


@contextmanager
def images_computed_once(model: nn.Module, *, steps: int, backwards: Backwards) -> Iterator[Sharing]:
    """Inside, the slices of a still image of `steps` time steps share what stands before the first neuron of `model`.

    To be entered inside `fresh_state`, for one batch whose weights rest.
    """
    sharing = Sharing(steps=steps, backwards=backwards)
    firsts = [module for module in model.modules() if isinstance(module, OncePerImage)]
    for first in firsts:
        first.sharing = sharing
    try:
        yield sharing
    finally:
        for first in firsts:
            first.sharing = None
