"""Backward through a sequence of which only the membranes between slices were kept: each slice is
computed again.

    run = Recomputed(model, slices)
    logits_TBK = run.forward()                       # no graph
    run.scalar(loss, dloss/dlogits_TBK).backward()   # newest slice first

Of a slice only its gradients outlive it, so the graph of one slice exists at a time.

Source: Chen et al. 2016 (arXiv 1604.06174), with one segment for each slice of time steps.
"""

# T time, B batch, K classes

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.spiking.op_scope import serving
from pipeline.spiking.state import State, states_of


@dataclass(frozen=True)
class _Moment:
    """Everything that a forward depends on, beside weights and input."""

    places: list[tuple[State, str]]
    membranes: list[Tensor]
    buffers: list[Tensor]
    generators: tuple[Tensor, Tensor | None]


class Recomputed:
    """One forward over `slices` of a sequence, and its backward. Used inside one `fresh_state`,
    which both must share.
    """

    def __init__(self, model: nn.Module, slices: Sequence[Tensor]) -> None:
        self.model = model
        self.slices = slices
        self.learnt = [p for p in model.parameters() if p.requires_grad]
        self.moments: list[_Moment] = []

    def forward(self) -> Tensor:
        """The logits `[T, B, K]` of all slices, without a graph."""
        logits = []
        with torch.no_grad():
            for x_cB in self.slices:
                self.moments.append(self._now())
                logits.append(self.model(x_cB))
        return torch.cat(logits)

    def scalar(self, loss: Tensor, error_TBK: Tensor) -> Tensor:
        """A scalar worth `loss` whose gradient is that of sum(error logits), the error a
        constant.
        """
        kept = [
            tensor for moment in self.moments for tensor in (*moment.membranes, *moment.buffers)
        ]
        return _Scalar.apply(loss.detach(), self, len(kept), error_TBK, *kept, *self.learnt)  # type: ignore[return-value]

    def gradients(self, error_TBK: Tensor, kept: Sequence[Tensor]) -> list[Tensor | None]:
        """sum over slices, newest first, of error^T dlogits/dW and of what comes back through the
        membranes after the slice.
        """
        total: list[Tensor | None] = [None] * len(self.learnt)
        errors = error_TBK.split([x_cB.shape[0] for x_cB in self.slices])
        kept = list(kept)
        after: dict[tuple[int, str], Tensor] = {}
        now = self._now()
        device = error_TBK.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for x_cB, error_cBK, moment in reversed(
                list(zip(self.slices, errors, self.moments, strict=True))
            ):
                kept, buffers = _split_last(kept, len(moment.buffers))
                kept, membranes = _split_last(kept, len(moment.membranes))
                leaves = [v.detach().requires_grad_(v.is_floating_point()) for v in membranes]
                self._set(moment, leaves, buffers)
                with torch.enable_grad(), serving("recomputation"):
                    logits_cBK = self.model(x_cB)
                outputs, incoming = [logits_cBK], [error_cBK]
                for place in self._now().places:
                    value, gradient = place[0].values[place[1]], after.get((id(place[0]), place[1]))
                    if gradient is not None and value.requires_grad:
                        outputs.append(value)
                        incoming.append(gradient)
                inputs = [*self.learnt, *(leaf for leaf in leaves if leaf.requires_grad)]
                found = torch.autograd.grad(outputs, inputs, incoming, allow_unused=True)
                for index, gradient in enumerate(found[: len(self.learnt)]):
                    if gradient is not None:
                        total[index] = gradient if total[index] is None else total[index] + gradient  # type: ignore[operator]
                carried = [
                    place
                    for place, leaf in zip(moment.places, leaves, strict=True)
                    if leaf.requires_grad
                ]
                after = {
                    (id(state), name): gradient
                    for (state, name), gradient in zip(
                        carried, found[len(self.learnt) :], strict=True
                    )
                    if gradient is not None
                }
        self._set(now, now.membranes, now.buffers)
        return total

    def _now(self) -> _Moment:
        places = [(state, name) for state in states_of(self.model) for name in state.values]
        cuda = next((p.device for p in self.model.parameters() if p.is_cuda), None)
        return _Moment(
            places=places,
            membranes=[state.values[name].detach() for state, name in places],
            buffers=[buffer.clone() for buffer in self.model.buffers()],
            generators=(
                torch.get_rng_state(),
                None if cuda is None else torch.cuda.get_rng_state(cuda),
            ),
        )

    def _set(self, moment: _Moment, membranes: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
        """Go back to a moment, its membranes and buffers taken from where autograd kept them."""
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
    """What was kept goes through `save_for_backward`, so that whoever counts saved bytes counts
    it.
    """

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, run: Recomputed, count: int, error_TBK: Tensor, *tensors: Tensor
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
