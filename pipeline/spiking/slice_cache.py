"""A cache of values that are equal in all slices of a batch.

The values are outputs for a static input, and standardised or 1-bit weights. A rule that passes
slices of time to the model opens `slice_cache` around them. If each slice has its own backward, the
rule sets `is_last` at the last differentiated slice, and passes the loss of each slice through
`with_gradients`:

    first slice     y = compute(), with a graph if any slice is differentiated
    slice t         uses y without its graph; the backward adds dL[t]/dy to the sum G
    last slice      uses y with its graph; the backward of its loss gives y the gradient
                    dL[last]/dy + G

So `compute` has one forward and one backward per batch, with no additional backward call. No
gradient is lost, even if the last slice does not use y.

The result is exact if the weights do not change within the batch, and if all slices of a
micro-batch scale their loss by the same factor (the micro-batch's weight, a loss scale).

`StaticInput` is a container for the layers before the first neuron. For a static input
(`encode.is_static`), all slices of a batch share the output of the first slice. If a module in the
container has a `presynaptic` trace, which changes at each step, each slice computes its own output.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from pipeline.spiking.encode import frame_of, is_static, repeat
from pipeline.spiking.norm import batch_norms
from pipeline.spiking.state import State, set_temporarily

Backwards = Literal["one", "several"]


class SliceCache:
    """The shared values of all slices of one batch with `steps` time steps.

    A rule sets `is_last` at the last differentiated slice. `frame_B` is the frame of a static
    input; it is None before the first slice.

    Args:
        backwards: "one" if a single backward call differentiates all slices, "several" if each
            slice has its own.
    """

    def __init__(self, *, steps: int, backwards: Backwards) -> None:
        self.steps = steps
        self.backwards: Backwards = backwards
        self.is_last = False
        self.needs_graph = torch.is_grad_enabled()
        self.frame_B: Tensor | None = None
        self._is_computing = False
        self._computed: list[tuple[State, str, Tensor]] = []
        # Gradients that no slice has given to its weight yet (`synapse.py`).
        self.postponed: dict[State, Any] = {}

    @property
    def collects_gradients(self) -> bool:
        """Whether each slice has its own backward, and the current slice is differentiated."""
        return self.backwards == "several" and torch.is_grad_enabled() and not self._is_computing

    def once(self, state: State, compute: Callable[[], Tensor], name: str = "y") -> Tensor:
        """The value `name` of the module with the state `state`, for the current slice.

        The first call runs `compute` and caches the result in `state`. Inside another `compute`,
        the result is not cached, because the result of the other `compute` contains it.
        """
        if self._is_computing:
            return compute()
        y = state.read(name)
        if y is None:
            # The first slice may run without gradients although a later slice needs the graph. With
            # one backward call, all slices have the same mode.
            has_graph = torch.is_grad_enabled() if self.backwards == "one" else self.needs_graph
            with torch.set_grad_enabled(has_graph), set_temporarily([self], "_is_computing", True):
                y = compute()
            state.write(name, y)
            if y.requires_grad:
                self._computed.append((state, name, y))
        if (
            self.backwards == "one"
            or self.is_last
            or not y.requires_grad
            or not torch.is_grad_enabled()
        ):
            return y
        return _CollectGradient.apply(  # type: ignore[return-value]
            y.detach().requires_grad_(), state, f"gradient of {name}"
        )

    def with_gradients(self, loss: Tensor) -> Tensor:
        """The loss of the current slice.

        For the last slice, the backward of the result also gives each cached value the sum of the
        gradients from the other slices.
        """
        if self.backwards == "one" or not self.is_last:
            return loss
        given: list[tuple[Tensor, Callable[[], Tensor | None]]] = [
            (y, partial(state.read, f"gradient of {name}")) for state, name, y in self._computed
        ]
        given += ((each.root, each.gradient) for each in self.postponed.values())
        if not given:
            return loss
        values, gradients = zip(*given, strict=True)
        return _AddGradients.apply(loss, gradients, *values)  # type: ignore[return-value]


class _CollectGradient(torch.autograd.Function):
    """The identity. Its backward adds the gradient to the sum in `state`, and stops there.

    The sum has at least fp32, like the gradients of the weights. The first gradient is copied:
    autograd passes one tensor to all operands of a + b, and a parameter among them may keep it as
    its `.grad` (torch 2.13).
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, state: State, name: str) -> Tensor:
        ctx.state, ctx.name = state, name
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, None]:
        (g,) = grad_outputs
        total = ctx.state.read(ctx.name)
        if total is None:
            total = g.to(torch.promote_types(g.dtype, torch.float32), copy=True)
            ctx.state.write(ctx.name, total)
        else:
            total.add_(g)
        return None, None, None


class _AddGradients(torch.autograd.Function):
    """The loss. Its backward also gives each of `values` its gradient from other slices."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, gradients: Sequence[Callable[[], Tensor | None]], *values: Tensor
    ) -> Tensor:
        ctx.gradients = gradients
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return (grad_outputs[0], None, *(gradient() for gradient in ctx.gradients))


@contextmanager
def slice_cache(model: nn.Module, *, steps: int, backwards: Backwards) -> Iterator[SliceCache]:
    """Give one cache to all modules with an attribute `slice_cache`, inside the block.

    The block must be inside `fresh_state`. The weights must not change inside the block.
    """
    cache = SliceCache(steps=steps, backwards=backwards)
    modules = (module for module in model.modules() if hasattr(module, "slice_cache"))
    with set_temporarily(modules, "slice_cache", cache):
        yield cache


# T time, B batch


class StaticInput(nn.Sequential):
    """Stateless layers before the first neuron, such as synapse, norm and pool.

    For a static input, the first slice updates the running statistics of batch norm as all T steps
    would.
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
            # Batch norm updates its statistics as for one frame at all T steps.
            with set_temporarily(batch_norms(self), "repeats", cache.steps):
                return frame_of(super(StaticInput, self).forward(input))

        return repeat(cache.once(self.state, compute), len(input))


def _is_slice_of_static_frame(x_TB: Tensor, cache: SliceCache) -> bool:
    """Whether `x_TB` is a part of the T steps of a static input.

    The first call stores the frame in the cache. This keeps the storage of the frame alive, so that
    no other tensor gets the same storage.
    """
    if not is_static(x_TB) or len(x_TB) == cache.steps:
        return False
    if cache.frame_B is None:
        cache.frame_B = x_TB[0]
    frame_B, x_B = cache.frame_B, x_TB[0]
    # Storage and offset are compared, not the address, because a meta tensor has no address.
    return (
        x_B.untyped_storage()._cdata == frame_B.untyped_storage()._cdata
        and x_B.storage_offset() == frame_B.storage_offset()
        and x_B.shape == frame_B.shape
    )
