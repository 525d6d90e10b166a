"""Backpropagation through time, the baseline of every other rule."""

# T time, B batch, K classes

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from pipeline.core.checks import refuse_unless_counts, require
from pipeline.rules.base import (
    LossOf,
    LossTerm,
    Rule,
    carrying_modules,
    slice_loss,
    slices,
)
from pipeline.spiking.op_scope import op_scope
from pipeline.spiking.slice_cache import slice_cache
from pipeline.spiking.state import State, fresh_state, states_of


class BPTT(Rule):
    """One backward through all T steps. Memory grows with T.

        L = 1/T sum_t loss_of(o[t])   (over_time "steps")
        L = loss_of(1/T sum_t o[t])   (over_time "mean")

    Args:
        chunk: number of steps per forward call (None: T). The graph is the same, built in slices.
        recompute: keep only the membranes between slices of `chunk` steps (None: 1), and recompute
            each slice in the backward. The gradient is the same, for about 4/3 of the time. Of the
            saved memory only membranes and the running statistics of batch norm grow with T. The
            running statistics are updated once, and dropout draws the same masks again.
        truncate: cut the graph after every `truncate` steps, and differentiate each piece when it
            is complete. Memory does not grow with T. 1 is SLTT; T is BPTT.

    Raises: ValueError if chunk or truncate is not in 1..T, or if options exclude each other.
    Source: Neftci et al. 2019 (arXiv 1901.09948) for the surrogate gradient through time; Chen et
    al. 2016 (arXiv 1604.06174) for recomputation; Williams & Peng 1990 (doi
    10.1162/neco.1990.2.4.490) for truncation.
    """

    def __init__(
        self, chunk: int | None = None, *, recompute: bool = False, truncate: int | None = None
    ) -> None:
        super().__init__()
        given = {"chunk": chunk, "truncate": truncate}
        given = {name: value for name, value in given.items() if value is not None}
        refuse_unless_counts("BPTT", given, up_to="T")
        require(
            truncate is None or (not recompute and chunk is None),
            "BPTT: truncate excludes recompute and chunk: a piece is one forward, and short; "
            f"got truncate={truncate}, recompute={recompute}, chunk={chunk}",
        )
        if recompute:
            self.label, self.chunk = "BPTT-recompute", chunk or 1
        elif truncate is not None:
            self.label, self.chunk = f"BPTT-truncate-{truncate}", truncate
        elif chunk is not None:
            self.label, self.chunk = f"BPTT-chunk-{chunk}", chunk
        self.recompute = recompute
        self.truncate = truncate
        self.memory = "linear" if truncate is None else "constant"
        self.over_time_choices = ("steps", "mean") if truncate is None else ("steps",)

    def check_steps(self, steps: int) -> None:
        require(
            self.truncate is None or self.truncate <= steps,
            f"BPTT: truncate must be in 1..T; got truncate={self.truncate}, T={steps}",
        )
        super().check_steps(steps)

    def _loss_terms(
        self, model: nn.Module, x_TB: Tensor, loss_of: LossOf, step: int, rows: Sequence[int]
    ) -> Iterator[LossTerm]:
        steps = x_TB.shape[0]
        backwards = "one" if self.truncate is None else "several"
        with fresh_state(model), slice_cache(model, steps=steps, backwards=backwards) as cache:
            if self.truncate is None:
                forward = partial(recomputed, model) if self.recompute else model
                logits_TBK = torch.cat([forward(x_cB) for x_cB in x_TB.split(self.chunk or steps)])
                loss, mean_logits_BK = self.loss_over_time(logits_TBK, loss_of)
                yield LossTerm(backward=loss, loss=loss.detach(), logits=mean_logits_BK)
                return
            last = (steps - 1) // self.truncate
            for index, x_cB in enumerate(slices(x_TB, self.truncate)):
                cache.is_last = index == last
                loss, share_BK = slice_loss(model(x_cB), loss_of, steps=steps)
                backward = cache.with_gradients(loss)
                yield LossTerm(backward=backward, loss=loss.detach(), logits=share_BK)
                for module in carrying_modules(model):
                    values = cast(State, module.state).values
                    values.update({name: value.detach() for name, value in values.items()})


Values = Mapping[tuple[State, str], Tensor]


def recomputed(model: nn.Module, x_cB: Tensor) -> Tensor:
    """The logits of one slice. The backward computes the slice again.

    Until then only the state before the slice is kept: membranes, buffers and random generators.
    So the graph of one slice exists at a time. torch's checkpoint was not used: without reentry it
    hides the recomputed tensors from the counter of saved bytes (`measure/saved_bytes.py`), with
    reentry it adds to the gradients of the weights at each slice (torch 2.13).

    Forward and backward must share one `fresh_state`.

    Source: Chen et al. 2016 (arXiv 1604.06174), with one segment per slice of time steps.
    """
    before, after = _values(model), []
    learnt = (p for p in model.parameters() if p.requires_grad)
    logits_cBK, *values = _Recomputed.apply(  # type: ignore[misc]
        model, x_cB, list(before), after, *before.values(), *learnt
    )
    for (state, name), value in zip(after, values, strict=True):
        state.values[name] = value
    return logits_cBK


class _Recomputed(torch.autograd.Function):
    """(membranes before the slice, weights) -> (logits, membranes after it).

    `before` and `after` name the membranes; the forward fills `after`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        model: nn.Module,
        x_cB: Tensor,
        before: list[tuple[State, str]],
        after: list[tuple[State, str]],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.model, ctx.x_cB, ctx.before, ctx.after = model, x_cB, before, after
        ctx.generators = torch.get_rng_state(), *get_device_states(x_cB)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[: len(before)], *(b.clone() for b in model.buffers()))
        logits_cBK, values = model(x_cB), _values(model)
        after.extend(values)
        return logits_cBK, *values.values()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        model, kept, count = ctx.model, ctx.saved_tensors, len(ctx.before)
        leaves = [v.detach().requires_grad_(v.is_floating_point()) for v in kept[:count]]
        inputs = [*leaves, *(p for p in model.parameters() if p.requires_grad)]
        values, buffers = _values(model), [buffer.clone() for buffer in model.buffers()]
        host, devices, device_states = ctx.generators
        _restore(model, dict(zip(ctx.before, leaves, strict=True)), kept[count:])
        with (
            torch.random.fork_rng(devices),
            torch.enable_grad(),
            op_scope("recomputation"),
        ):
            torch.set_rng_state(host)
            set_device_states(devices, device_states)
            outputs = [model(ctx.x_cB), *(state.values[name] for state, name in ctx.after)]
        ends = [
            (output, gradient)
            for output, gradient in zip(outputs, grad_outputs, strict=True)
            if gradient is not None and output.requires_grad
        ]
        gradients = torch.autograd.grad(
            [output for output, _ in ends],
            [each for each in inputs if each.requires_grad],
            [gradient for _, gradient in ends],
            allow_unused=True,
        )
        _restore(model, values, buffers)  # not earlier: the graph of batch norm holds its buffers
        in_order = iter(gradients)
        return (
            None,
            None,
            None,
            None,
            *(next(in_order) if each.requires_grad else None for each in inputs),
        )


def _values(model: nn.Module) -> Values:
    return {
        (state, name): value for state in states_of(model) for name, value in state.values.items()
    }


def _restore(model: nn.Module, values: Values, buffers: Sequence[Tensor]) -> None:
    for state in states_of(model):
        state.values.clear()
    for (state, name), value in values.items():
        state.values[name] = value
    for buffer, kept in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(kept)
