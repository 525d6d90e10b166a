"""What is the same in every slice of a batch, computed once: what comes of a still image, and weights that are made of others.

A rule that gives the model one slice of time after another opens `computed_once` around them, and says so where one slice is
the last that it differentiates:

    y = make()                                  at the first slice, with its graph if any slice learns
    slice t reads a copy of y without a graph, which collects the gradient of its backward: G = sum_t dL[t]/dy
    the last slice reads y itself; to the gradient that comes back, G is added, and the sum goes on into `make`

So `make` has one forward and one backward a batch, and no backward call is added. All gradients of a micro-batch carry the
same factor (its share, a loss scale), so G does.

It is exact where each slice's gradient is linear in dL[t]/dy with one factor for all t, and the weights rest meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.spiking.state import State

Backwards = Literal["one", "several"]


class Sharing:
    """What the slices of one batch of `steps` time steps have in common.

    `backwards`: whether one backward call goes through all of them, or several through each or some.
    """

    def __init__(self, *, steps: int, backwards: Backwards) -> None:
        self.steps = steps
        self.backwards: Backwards = backwards
        self.is_last = False
        """whether the slice at hand is the last that is differentiated; a rule of several backward calls sets it"""
        self.learns = torch.is_grad_enabled()
        self.image_B: Tensor | None = None
        """the still image of the batch, from when it is first seen"""
        self._makes = False

    def once(self, state: State, make: Callable[[], Tensor]) -> Tensor:
        """What `make` makes, for the slice at hand; remembered in `state`, with the gradient that it collects.

        What is made on the way to something else is made there alone, and not remembered.
        """
        if self._makes:
            return make()
        y = state.read("y")
        if y is None:
            y = self._made(state, make)
            state.write("y", y)
        if self.backwards == "several" and not self.is_last and y.requires_grad and torch.is_grad_enabled():
            return _without_graph(state, y)
        return y

    def _made(self, state: State, make: Callable[[], Tensor]) -> Tensor:
        # A slice that does not learn may come before one that does; one backward through all slices finds one mode for all.
        with_graph = torch.is_grad_enabled() if self.backwards == "one" else self.learns
        self._makes = True
        try:
            with torch.set_grad_enabled(with_graph):
                y = make()
        finally:
            self._makes = False
        if y.requires_grad and self.backwards == "several":

            def with_what_was_collected(g: Tensor) -> Tensor:
                collected = state.read("gradient")
                return g if collected is None else (g + collected).to(g.dtype)

            y.register_hook(with_what_was_collected)
        return y


def _without_graph(state: State, y: Tensor) -> Tensor:
    """A copy of y, on which the gradients of several backward calls add up."""
    copy = state.read("copy")
    if copy is None:
        # Never below fp32, as the gradients of the weights are not that it stands for.
        copy = y.detach().to(torch.promote_types(y.dtype, torch.float32)).requires_grad_()
        # Made here, and added to in place, so that it is among what the network remembers, and counted.
        copy.grad = torch.zeros_like(copy)
        state.write("copy", copy)
        state.write("gradient", copy.grad)
    return copy.to(y.dtype)


@contextmanager
def computed_once(model: nn.Module, *, steps: int, backwards: Backwards) -> Iterator[Sharing]:
    """Inside, the slices of a batch of `steps` time steps share what each module of `model` with a `sharing` makes once.

    To be entered inside `fresh_state`, for one batch whose weights rest.
    """
    sharing = Sharing(steps=steps, backwards=backwards)
    sharers: list[Any] = [module for module in model.modules() if hasattr(module, "sharing")]
    for sharer in sharers:
        sharer.sharing = sharing
    try:
        yield sharing
    finally:
        for sharer in sharers:
            sharer.sharing = None
