"""Backpropagation through time, the baseline of every other rule."""

# T time, B batch, K classes

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
from pipeline.spiking.slice_cache import SliceCache, slice_cache
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
        self.chunk = (
            truncate if truncate is not None else 1 if recompute and chunk is None else chunk
        )
        self.recompute = recompute
        self.truncate = truncate
        self.memory = "linear" if truncate is None else "constant"
        self.over_time_choices = ("steps", "mean") if truncate is None else ("steps",)

    @property
    def label(self) -> str:
        if self.truncate is not None:
            return f"BPTT-truncate-{self.truncate}"
        if self.recompute:
            return "BPTT-recompute"
        return "BPTT" if self.chunk is None else f"BPTT-chunk-{self.chunk}"

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
            if self.truncate is not None:
                yield from self._in_pieces(model, x_TB, loss_of, cache)
            elif self.recompute:
                yield self._computed_twice(model, x_TB, loss_of)
            else:
                logits_TBK = torch.cat([model(x_cB) for x_cB in x_TB.split(self.chunk or steps)])
                loss, mean_logits_BK = self.loss_over_time(logits_TBK, loss_of)
                yield LossTerm(backward=loss, loss=loss.detach(), logits=mean_logits_BK)

    def _in_pieces(
        self, model: nn.Module, x_TB: Tensor, loss_of: LossOf, cache: SliceCache
    ) -> Iterator[LossTerm]:
        steps = x_TB.shape[0]
        for first, x_cB in zip(
            range(0, steps, self.chunk or 1), slices(x_TB, self.chunk), strict=True
        ):
            cache.is_last = first + len(x_cB) == steps
            loss, share_BK = slice_loss(model(x_cB), loss_of, steps=steps)
            yield LossTerm(backward=cache.with_gradients(loss), loss=loss.detach(), logits=share_BK)
            for module in carrying_modules(model):
                state: State = module.state  # type: ignore[assignment]
                state.values.update({name: value.detach() for name, value in state.values.items()})

    def _computed_twice(self, model: nn.Module, x_TB: Tensor, loss_of: LossOf) -> LossTerm:
        run = Recomputation(model, x_TB.split(self.chunk or 1))
        with torch.enable_grad():
            logits_TBK = run.forward().requires_grad_()
            loss, mean_logits_BK = self.loss_over_time(logits_TBK, loss_of)
            (error_TBK,) = torch.autograd.grad(loss, logits_TBK)
        return LossTerm(
            backward=run.scalar(loss, error_TBK), loss=loss.detach(), logits=mean_logits_BK
        )


@dataclass(frozen=True)
class _Snapshot:
    """The state that a forward depends on, besides weights and input."""

    places: list[tuple[State, str]]
    membranes: list[Tensor]
    buffers: list[Tensor]
    generators: tuple[Tensor, Tensor | None]


class Recomputation:
    """One forward over `slices` without a graph, and a backward that recomputes each slice.

        run = Recomputation(model, slices)
        logits_TBK = run.forward()                       # no graph
        run.scalar(loss, dloss/dlogits_TBK).backward()   # newest slice first

    Only the graph of one slice exists at a time. Forward and backward must share one `fresh_state`.

    Source: Chen et al. 2016 (arXiv 1604.06174), with one segment per slice of time steps.
    """

    def __init__(self, model: nn.Module, slices: Sequence[Tensor]) -> None:
        self.model = model
        self.slices = slices
        self.learnt = [p for p in model.parameters() if p.requires_grad]
        self.moments: list[_Snapshot] = []

    def forward(self) -> Tensor:
        """The logits `[T, B, K]` of all slices, without a graph."""
        logits = []
        with torch.no_grad():
            for x_cB in self.slices:
                self.moments.append(self._now())
                logits.append(self.model(x_cB))
        return torch.cat(logits)

    def scalar(self, loss: Tensor, error_TBK: Tensor) -> Tensor:
        """A scalar with the value of `loss` and the gradient of sum(error logits).

        The error is a constant.
        """
        kept = [each for now in self.moments for each in (*now.membranes, *now.buffers)]
        return _Scalar.apply(  # type: ignore[return-value]
            loss.detach(), self, len(kept), error_TBK, *kept, *self.learnt
        )

    def gradients(self, error_TBK: Tensor, kept: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients, summed over slices, newest first.

        Each slice contributes error^T dlogits/dW, and the gradient through the membranes after it.
        """
        total: list[Tensor | None] = [None] * len(self.learnt)
        errors = error_TBK.split([x_cB.shape[0] for x_cB in self.slices])
        kept = list(kept)
        after: dict[tuple[State, str], Tensor | None] = {}
        now = self._now()
        with torch.random.fork_rng([error_TBK.device] if error_TBK.is_cuda else []):
            for x_cB, error_cBK, moment in reversed(
                list(zip(self.slices, errors, self.moments, strict=True))
            ):
                kept, buffers = _split_last(kept, len(moment.buffers))
                kept, membranes = _split_last(kept, len(moment.membranes))
                leaves = [v.detach().requires_grad_(v.is_floating_point()) for v in membranes]
                self._set(moment, leaves, buffers)
                with torch.enable_grad(), op_scope("recomputation"):
                    logits_cBK = self.model(x_cB)
                outputs, incoming = [logits_cBK], [error_cBK]
                for state, name in self._now().places:
                    value, gradient = state.values[name], after.get((state, name))
                    if gradient is not None and value.requires_grad:
                        outputs.append(value)
                        incoming.append(gradient)
                inputs = [*self.learnt, *(leaf for leaf in leaves if leaf.requires_grad)]
                gradients = torch.autograd.grad(outputs, inputs, incoming, allow_unused=True)
                for index, gradient in enumerate(gradients[: len(self.learnt)]):
                    if gradient is not None:
                        so_far = total[index]
                        total[index] = gradient if so_far is None else so_far + gradient
                pairs = zip(moment.places, leaves, strict=True)
                carried = [place for place, leaf in pairs if leaf.requires_grad]
                after = dict(zip(carried, gradients[len(self.learnt) :], strict=True))
        self._set(now, now.membranes, now.buffers)
        return total

    def _now(self) -> _Snapshot:
        places = [(state, name) for state in states_of(self.model) for name in state.values]
        cuda = next((p.device for p in self.model.parameters() if p.is_cuda), None)
        return _Snapshot(
            places=places,
            membranes=[state.values[name].detach() for state, name in places],
            buffers=[buffer.clone() for buffer in self.model.buffers()],
            generators=(
                torch.get_rng_state(),
                None if cuda is None else torch.cuda.get_rng_state(cuda),
            ),
        )

    def _set(
        self, moment: _Snapshot, membranes: Sequence[Tensor], buffers: Sequence[Tensor]
    ) -> None:
        """Restore a snapshot. Membranes and buffers are arguments, as autograd has saved them."""
        for state in states_of(self.model):
            state.values.clear()
        for (state, name), value in zip(moment.places, membranes, strict=True):
            state.values[name] = value
        for buffer, value in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(value)
        host, device = moment.generators
        torch.set_rng_state(host)
        if device is not None:
            torch.cuda.set_rng_state(
                device, next(p.device for p in self.model.parameters() if p.is_cuda)
            )


class _Scalar(torch.autograd.Function):
    """The scalar of `Recomputation.scalar`.

    Kept tensors pass through `save_for_backward`, so that the counter of saved bytes sees them.
    """

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, run: Recomputation, count: int, error_TBK: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.run, ctx.count = run, count
        ctx.save_for_backward(error_TBK, *tensors[:count])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        error_TBK, *kept = ctx.saved_tensors
        gradients = ctx.run.gradients(error_TBK * grad_outputs[0].to(error_TBK.dtype), kept)
        return (None, None, None, None, *[None] * ctx.count, *gradients)


def _split_last(tensors: list[Tensor], count: int) -> tuple[list[Tensor], list[Tensor]]:
    cut = len(tensors) - count
    return tensors[:cut], tensors[cut:]
