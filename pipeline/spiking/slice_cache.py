"""What is the same in every slice of a batch, computed once: what comes of a still image, and
weights that are made of others.

A rule that gives the model one slice of time after another opens `slice_cache` around them, and
says so where one slice is the last that it differentiates, whose loss it hands over:

    y = make()                                  at the first slice, with its graph if any slice
    learns
    slice t reads a copy of y without a graph, which collects the gradient of its backward: G =
    sum_t dL[t]/dy the last slice reads y itself, and the backward of its loss hands y beside
    dL[last]/dy the G of the others

So `make` has one forward and one backward a batch, no backward call is added, and nothing is lost
of what the last slice does not read. All gradients of a micro-batch carry the same factor (its
share, a loss scale), so G does.

It is exact where each slice's gradient is linear in dL[t]/dy with one factor for all t, and the
weights rest meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.spiking.state import State, attribute_set

Backwards = Literal["one", "several"]


class SliceCache:
    """What the slices of one batch of `steps` time steps have in common.

    `backwards`: whether one backward call goes through all of them, or several through each or
    some. `parameters`: gives what gradients are left on beside what is made once.
    """

    def __init__(
        self,
        *,
        steps: int,
        backwards: Backwards,
        parameters: Callable[[], Iterable[Tensor]] = tuple,
    ) -> None:
        self.steps = steps
        self.backwards: Backwards = backwards
        self.parameters = parameters
        self.is_last = False
        """whether the slice at hand is the last that is differentiated; a rule of several backward
        calls sets it
        """
        self.learns = torch.is_grad_enabled()
        self.image_B: Tensor | None = None
        """the still image of the batch, from when it is first seen"""
        self._makes = False
        self._made: list[tuple[State, Tensor]] = []

    def once(self, state: State, make: Callable[[], Tensor]) -> Tensor:
        """What `make` makes, for the slice at hand; remembered in `state`, with the gradient that
        it collects.

        What is made on the way to something else is made there alone, and not remembered.
        """
        if self._makes:
            return make()
        y = state.read("y")
        if y is None:
            y = self._make(make)
            state.write("y", y)
            if y.requires_grad:
                self._made.append((state, y))
        if (
            self.backwards == "several"
            and not self.is_last
            and y.requires_grad
            and torch.is_grad_enabled()
        ):
            return self._without_graph(state, y)
        return y

    def with_gradients(self, loss: Tensor) -> Tensor:
        """The loss of the slice at hand; of the last one, with what the others collected in its
        backward.

        To be asked before every backward, whatever the slice has read.
        """
        self._note_gradients()
        if self.backwards == "one" or not self.is_last or not self._made:
            return loss
        states, made = zip(*self._made, strict=True)
        # apply is untyped
        return _AddGradients.apply(loss, states, *made)  # type: ignore[return-value]

    def _without_graph(self, state: State, y: Tensor) -> Tensor:
        """A copy of y, on which the gradients of several backward calls add up."""
        copy = state.read("copy")
        if copy is None:
            # Never below fp32, as the gradients of the weights are not that it stands for.
            copy = y.detach().to(torch.promote_types(y.dtype, torch.float32)).requires_grad_()
            state.write("copy", copy)
        return copy.to(y.dtype)

    def _note_gradients(self) -> None:
        """Those that a first backward has left: they are among what the network remembers, and
        counted.

        Others are added to them in place, so each needs memory of its own: of a sum autograd gives
        all terms one gradient, and leaves it on several of them (torch 2.13).
        """
        copies = [
            (state, copy) for state, _ in self._made if (copy := state.read("copy")) is not None
        ]
        new = [
            (state, copy, copy.grad)
            for state, copy in copies
            if copy.grad is not None and state.read("gradient") is None
        ]
        if not new:
            return
        leaves = (*(copy for _, copy in copies), *self.parameters())
        places = Counter(_memory(leaf.grad) for leaf in leaves if leaf.grad is not None)
        for state, copy, gradient in new:
            if places[_memory(gradient)] > 1:
                gradient = copy.grad = gradient.clone()
            state.write("gradient", gradient)

    def _make(self, make: Callable[[], Tensor]) -> Tensor:
        # A slice that does not learn may come before one that does; one backward through all slices
        # finds one mode for all.
        with_graph = torch.is_grad_enabled() if self.backwards == "one" else self.learns
        self._makes = True
        try:
            with torch.set_grad_enabled(with_graph):
                return make()
        finally:
            self._makes = False


class _AddGradients(torch.autograd.Function):
    """The loss as it is, and in its backward for each y the gradient that its state has
    collected.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, states: tuple[State, ...], *made: Tensor) -> Tensor:
        ctx.states = states
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return (grad_outputs[0], None, *(state.read("gradient") for state in ctx.states))


def _memory(value: Tensor) -> int:
    return value.untyped_storage()._cdata  # not its address: a tensor without values has none


@contextmanager
def slice_cache(model: nn.Module, *, steps: int, backwards: Backwards) -> Iterator[SliceCache]:
    """Inside, the slices of a batch of `steps` time steps share what each module of `model` with a
    `cache` makes once.

    To be entered inside `fresh_state`, for one batch whose weights rest.
    """
    cache = SliceCache(steps=steps, backwards=backwards, parameters=model.parameters)
    modules = [module for module in model.modules() if hasattr(module, "slice_cache")]
    with attribute_set(modules, "slice_cache", cache):
        yield cache
