"""A cache of values that all slices of a batch share: outputs for a static input, derived weights.

A rule that passes slices of time to the model opens `slice_cache` around them. If each slice has
its own backward, the rule marks the last differentiated slice and passes its loss through
`with_gradients`:

    first slice     y = compute(), with a graph if any slice is differentiated
    slice t         reads y without a graph, and collects G = sum_t dL[t]/dy
    last slice      reads y itself; the backward of its loss gives y dL[last]/dy + G

So `compute` has one forward and one backward per batch. No backward call is added, and no gradient
is lost if the last slice does not read y. All gradients of a micro-batch, and so G, have the same
factor (its weight in the batch, a loss scale).

The result is exact if the weights do not change within the batch and each slice's gradient is
linear in dL[t]/dy with the same factor for all t.

`StaticInput` holds the layers before the first neuron. A call on several steps of a static input
(`encode.is_static`) computes them once, and slices of a batch share the result of the first slice.
With a `presynaptic` seam, whose factor changes from step to step, they are computed at each step.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from pipeline.spiking.encode import is_static, repeat
from pipeline.spiking.norm import batch_norms
from pipeline.spiking.state import State, attribute_set

Backwards = Literal["one", "several"]


class SliceCache:
    """The shared values of the slices of one batch of `steps` time steps.

    A rule sets `is_last` for the last differentiated slice. `frame_B` is the frame of a static
    input, once it was seen.

    Args:
        backwards: "one" if a single backward call passes through all slices, "several" if there are
            more.
    """

    def __init__(self, *, steps: int, backwards: Backwards) -> None:
        self.steps = steps
        self.backwards: Backwards = backwards
        self.is_last = False
        self.needs_graph = torch.is_grad_enabled()
        self.frame_B: Tensor | None = None
        self._is_computing = False
        self._computed: list[tuple[State, Tensor]] = []

    def once(self, state: State, compute: Callable[[], Tensor]) -> Tensor:
        """The cached value of `state`, for the current slice; `compute` runs at the first call.

        A value that is needed inside another `compute` is computed there and not cached.
        """
        if self._is_computing:
            return compute()
        y = state.read("y")
        if y is None:
            # The first slice may run without a graph although a later one needs it. With one
            # backward call all slices have the same mode.
            with_graph = torch.is_grad_enabled() if self.backwards == "one" else self.needs_graph
            with torch.set_grad_enabled(with_graph), attribute_set([self], "_is_computing", True):
                y = compute()
            state.write("y", y)
            if y.requires_grad:
                self._computed.append((state, y))
        if (
            self.backwards == "one"
            or self.is_last
            or not y.requires_grad
            or not torch.is_grad_enabled()
        ):
            return y
        return _Collected.apply(y.detach().requires_grad_(), state)  # type: ignore[return-value]

    def with_gradients(self, loss: Tensor) -> Tensor:
        """The loss of the current slice.

        For the last slice its backward adds the gradients that the other slices collected.
        """
        if self.backwards == "one" or not self.is_last or not self._computed:
            return loss
        states, made = zip(*self._computed, strict=True)
        # apply is untyped
        return _AddGradients.apply(loss, states, *made)  # type: ignore[return-value]


class _Collected(torch.autograd.Function):
    """Identity on y. Its backward adds the gradient to `state`, and passes none on.

    The sum has at least fp32, like the gradients of the weights behind y. It is memory of the
    network. The first gradient is copied, because autograd passes one tensor to all terms of a sum,
    and a parameter among them may adopt it as its own gradient (torch 2.13).
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, state: State) -> Tensor:
        ctx.state = state
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None]:
        (g,) = grad_outputs
        total = ctx.state.read("gradient")
        if total is None:
            total = g.to(torch.promote_types(g.dtype, torch.float32), copy=True)
            ctx.state.write("gradient", total)
        else:
            total.add_(g)
        return None, None


class _AddGradients(torch.autograd.Function):
    """Identity on the loss. Its backward gives each y the accumulated gradient of its state."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, states: tuple[State, ...], *made: Tensor) -> Tensor:
        ctx.states = states
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return (grad_outputs[0], None, *(state.read("gradient") for state in ctx.states))


@contextmanager
def slice_cache(model: nn.Module, *, steps: int, backwards: Backwards) -> Iterator[SliceCache]:
    """Share the cached values of modules with a `slice_cache` seam among the slices of a batch.

    It is entered inside `fresh_state`, for one batch during which the weights do not change.
    """
    cache = SliceCache(steps=steps, backwards=backwards)
    modules = [module for module in model.modules() if hasattr(module, "slice_cache")]
    with attribute_set(modules, "slice_cache", cache):
        yield cache


# T time, B batch


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
    def of(cls, sequence: nn.Sequential) -> Self:
        """A StaticInput with the modules of `sequence` under the same names."""
        return cls(OrderedDict(sequence.named_children()))

    def forward(self, input: Tensor) -> Tensor:
        cache = self.slice_cache
        if (
            cache is None
            or not _is_slice_of_static_frame(input, cache)
            or any(getattr(module, "presynaptic", None) is not None for module in self.modules())
        ):
            return super().forward(input)

        def compute() -> Tensor:
            # Batch norm treats its input as one frame repeated `steps` times.
            with attribute_set(batch_norms(self), "repeats", cache.steps):
                return super(StaticInput, self).forward(input)[0]

        return repeat(cache.once(self.state, compute), len(input))


def _is_slice_of_static_frame(x_TB: Tensor, cache: SliceCache) -> bool:
    """Whether `x_TB` is a slice of the batch's static frame.

    The frame is kept alive, so that its storage is not reused.
    """
    if not is_static(x_TB) or len(x_TB) == cache.steps:
        return False
    if cache.frame_B is None:
        cache.frame_B = x_TB[0]
    frame_B, x_B = cache.frame_B, x_TB[0]
    # Storage and offset; not the address, which a meta tensor lacks.
    return (
        x_B.untyped_storage()._cdata == frame_B.untyped_storage()._cdata
        and x_B.storage_offset() == frame_B.storage_offset()
        and x_B.shape == frame_B.shape
    )
