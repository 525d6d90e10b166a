"""Backpropagation through time, the baseline of every other rule."""

# T time, B batch, K classes

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from pipeline.core.checks import refuse_unless_counts, require
from pipeline.rules.base import (
    LossFn,
    LossTerm,
    Rule,
    modules_with_carry,
    slice_loss,
    slices,
)
from pipeline.spiking.op_scope import op_scope
from pipeline.spiking.slice_cache import slice_cache
from pipeline.spiking.state import State, fresh_state, states_of


class BPTT(Rule):
    """One backward through all T steps. Memory grows with T.

        L = 1/T sum_t loss_fn(o[t])   (over_time "steps")
        L = loss_fn(1/T sum_t o[t])   (over_time "mean")

    Args:
        chunk: the number of time steps per forward (None: T). The gradient is the same.
        recompute: whether the forward keeps only the state between slices of `chunk` steps (None:
            T/2, rounded up), and the backward recomputes each slice. The gradient is the same, and
            a batch takes about 4/3 of the time. Besides one slice, only membranes and copies of the
            model's buffers are kept for each slice. The running statistics of batch norm are
            updated once, and dropout uses the same masks again.
        truncate: the number of time steps per backward (None: T). The graph is cut after each
            backward, so memory does not grow with T. 1 is SLTT; T is BPTT.

    Raises: ValueError for chunk or truncate below 1, truncate with recompute or chunk (`__init__`);
    for chunk or truncate above T (`check_steps`); for chunk, recompute or truncate with a module
    that needs all T steps in one call, or truncate with a loss over mean logits (`attach`).
    Source: Neftci et al. 2019 (arXiv 1901.09948) for the surrogate gradient through time; Chen et
    al. 2016 (arXiv 1604.06174) for recomputation; Williams & Peng 1990 (doi
    10.1162/neco.1990.2.4.490) for truncation.
    """

    def __init__(
        self, chunk: int | None = None, *, recompute: bool = False, truncate: int | None = None
    ) -> None:
        super().__init__()
        counts = {"chunk": chunk, "truncate": truncate}
        counts = {name: value for name, value in counts.items() if value is not None}
        refuse_unless_counts("BPTT", counts, up_to="T")
        require(
            truncate is None or (not recompute and chunk is None),
            "BPTT: truncate must not be combined with recompute or chunk; got"
            f" truncate={truncate}, recompute={recompute}, chunk={chunk}",
        )
        if recompute:
            self.label, self.chunk = "BPTT-recompute", chunk
        elif truncate is not None:
            self.label, self.chunk = f"BPTT-truncate-{truncate}", truncate
        elif chunk is not None:
            self.label, self.chunk = f"BPTT-chunk-{chunk}", chunk
        self.recompute = recompute
        self.truncate = truncate
        self.memory = "linear" if truncate is None else "constant"
        self.over_time_choices = ("steps", "mean") if truncate is None else ("steps",)

    @property
    def passes_slices(self) -> bool:
        return self.recompute or super().passes_slices

    def steps_per_forward(self, steps: int) -> int:
        # Shorter slices keep more membranes, which are more bytes than they save in a small
        # network with fused neurons.
        is_default = self.recompute and self.chunk is None
        return math.ceil(steps / 2) if is_default else super().steps_per_forward(steps)

    def check_steps(self, steps: int) -> None:
        require(
            self.truncate is None or self.truncate <= steps,
            f"BPTT: truncate must be in 1..T; got truncate={self.truncate}, T={steps}",
        )
        super().check_steps(steps)

    def _loss_terms(
        self, model: nn.Module, x_TB: Tensor, loss_fn: LossFn, step: int, rows: Sequence[int]
    ) -> Iterator[LossTerm]:
        steps = x_TB.shape[0]
        backwards = "one" if self.truncate is None else "several"
        with fresh_state(model), slice_cache(model, steps=steps, backwards=backwards) as cache:
            if self.truncate is None:
                forward = partial(recompute_in_backward, model) if self.recompute else model
                slices_cB = x_TB.split(self.steps_per_forward(steps))
                logits_TBK = torch.cat([forward(x_cB) for x_cB in slices_cB])
                loss, mean_logits_BK = self.loss_over_time(logits_TBK, loss_fn)
                yield LossTerm(backward=loss, loss=loss.detach(), logits=mean_logits_BK)
                return
            last_slice = (steps - 1) // self.truncate
            for index, x_cB in enumerate(slices(x_TB, self.truncate)):
                cache.is_last = index == last_slice
                loss, logits_BK = slice_loss(model(x_cB), loss_fn, steps=steps)
                yield LossTerm(
                    backward=cache.with_gradients(loss), loss=loss.detach(), logits=logits_BK
                )
                for module in modules_with_carry(model):
                    values = cast(State, module.state).values
                    values.update({name: value.detach() for name, value in values.items()})


StateValues = Mapping[tuple[State, str], Tensor]


def recompute_in_backward(model: nn.Module, x_cB: Tensor) -> Tensor:
    """The logits of one slice. The backward computes the slice again.

    Until the backward, only the state before the slice is kept: membranes, buffers and random
    generators. So only one slice has a graph at any time. torch's checkpoint (2.13) is not used.
    Without reentry, it hides the recomputed tensors from the counter of saved bytes
    (`measure/saved_bytes.py`). With reentry, it adds to the gradients of the weights at each slice.

    Forward and backward must run inside the same `fresh_state`.

    Source: Chen et al. 2016 (arXiv 1604.06174), with one segment per slice of time steps.
    """
    state_before = _state_values(model)
    keys_after: list[tuple[State, str]] = []
    logits_cBK, *values_after = _Recompute.apply(  # type: ignore[misc]
        model,
        x_cB,
        list(state_before),
        keys_after,
        *state_before.values(),
        *(p for p in model.parameters() if p.requires_grad),
    )
    for (state, name), value in zip(keys_after, values_after, strict=True):
        state.values[name] = value
    return logits_cBK


class _Recompute(torch.autograd.Function):
    """(state before the slice, parameters) -> (logits, state after the slice).

    `keys_before` and `keys_after` are the keys of the state values. The forward fills `keys_after`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        model: nn.Module,
        x_cB: Tensor,
        keys_before: list[tuple[State, str]],
        keys_after: list[tuple[State, str]],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.model, ctx.x_cB, ctx.keys_before, ctx.keys_after = model, x_cB, keys_before, keys_after
        ctx.generators = torch.get_rng_state(), *get_device_states(x_cB)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[: len(keys_before)], *(b.clone() for b in model.buffers()))
        logits_cBK = model(x_cB)
        state_after = _state_values(model)
        keys_after.extend(state_after)
        return logits_cBK, *state_after.values()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        model, saved, count = ctx.model, ctx.saved_tensors, len(ctx.keys_before)
        leaves = [v.detach().requires_grad_(v.is_floating_point()) for v in saved[:count]]
        inputs = [*leaves, *(p for p in model.parameters() if p.requires_grad)]
        current_state = _state_values(model)
        current_buffers = [buffer.clone() for buffer in model.buffers()]
        cpu_state, devices, device_states = ctx.generators
        _restore(model, dict(zip(ctx.keys_before, leaves, strict=True)), saved[count:])
        with (
            torch.random.fork_rng(devices),
            torch.enable_grad(),
            op_scope("recomputation"),
        ):
            torch.set_rng_state(cpu_state)
            set_device_states(devices, device_states)
            outputs = [model(ctx.x_cB), *(state.values[name] for state, name in ctx.keys_after)]
        differentiated = [
            (output, gradient)
            for output, gradient in zip(outputs, grad_outputs, strict=True)
            if gradient is not None and output.requires_grad
        ]
        gradients = torch.autograd.grad(
            [output for output, _ in differentiated],
            [each for each in inputs if each.requires_grad],
            [gradient for _, gradient in differentiated],
            allow_unused=True,
        )
        # After the backward, because the graph of batch norm uses its buffers.
        _restore(model, current_state, current_buffers)
        remaining = iter(gradients)
        return (
            *[None] * 4,
            *(next(remaining) if each.requires_grad else None for each in inputs),
        )


def _state_values(model: nn.Module) -> StateValues:
    return {
        (state, name): value for state in states_of(model) for name, value in state.values.items()
    }


def _restore(model: nn.Module, state_values: StateValues, buffers: Sequence[Tensor]) -> None:
    for state in states_of(model):
        state.values.clear()
    for (state, name), value in state_values.items():
        state.values[name] = value
    for buffer, old_buffer in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(old_buffer)
