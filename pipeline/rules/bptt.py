"""Backpropagation through time: the baseline every other rule stands beside."""

# T time, B batch, K classes

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts
from pipeline.rules.base import LossOf, LossTerm, OverTime, Rule, carriers, slices, steps_share
from pipeline.spiking.recompute import Recomputed
from pipeline.spiking.slice_cache import Sharing, slice_cache
from pipeline.spiking.state import State, fresh_state


class BPTT(Rule):
    """One backward through all T steps; the whole sequence is kept for it.

        L = 1/T sum_t loss_of(o[t])  (over_time "steps")      or      loss_of(1/T sum_t o[t])
        (over_time "mean")

    `chunk` is the number of steps per forward call, None for all T at once: the same graph, built
    in slices.

    Two relatives that every comparison asks for:
    `recompute` keeps the membranes between slices of `chunk` steps (None: 1) and nothing else, and
    computes each slice again when its turn in the backward comes: the same gradient for about 4/3
    of the time. Of all that is saved only the membranes, and the running statistics of batch norm,
    grow with T. The latter move once, and what dropout drew is drawn again. `truncate` cuts the
    graph every so many steps, and differentiates each piece as soon as it is whole: memory knows
    the length of a piece and not T. 1 is SLTT; T is BPTT.

    Raises: ValueError when chunk or truncate are not in 1..T, or when options exclude each other.
    Source: Neftci et al. 2019 (arXiv 1901.09948) for the surrogate gradient through time; Chen et
    al. 2016 (arXiv 1604.06174) for recomputation; Williams & Peng 1990 (doi
    10.1162/neco.1990.2.4.490) for truncation.
    """

    over_time_choices = ("steps", "mean")

    def __init__(
        self, chunk: int | None = None, *, recompute: bool = False, truncate: int | None = None
    ) -> None:
        super().__init__()
        given = {
            name: value
            for name, value in (("chunk", chunk), ("truncate", truncate))
            if value is not None
        }
        refuse_unless_counts("BPTT", given, up_to="T")
        if truncate is not None and (recompute or chunk is not None):
            raise ValueError(
                "BPTT: truncate excludes recompute and chunk: a piece is one forward, and short; "
                f"got truncate={truncate}, recompute={recompute}, chunk={chunk}"
            )
        self.chunk = (
            truncate if truncate is not None else 1 if recompute and chunk is None else chunk
        )
        self.recompute = recompute
        self.truncate = truncate
        self.memory: Literal["constant", "linear"] = "linear" if truncate is None else "constant"

    @property
    def label(self) -> str:
        if self.truncate is not None:
            return f"BPTT-truncate-{self.truncate}"
        if self.recompute:
            return "BPTT-recompute"
        return "BPTT" if self.chunk is None else f"BPTT-chunk-{self.chunk}"

    def attach(self, model: nn.Module, *, over_time: OverTime = "steps", **more: Any) -> None:
        if self.truncate is not None and over_time == "mean":
            raise ValueError(
                f"{self.label}: the loss of the mean logits needs all T steps in one graph; got"
                " over_time='mean'"
            )
        super().attach(model, over_time=over_time, **more)

    def check_steps(self, steps: int) -> None:
        if self.truncate is not None and self.truncate > steps:
            raise ValueError(
                f"BPTT: truncate must be in 1..T; got truncate={self.truncate}, T={steps}"
            )
        super().check_steps(steps)

    def _loss_terms(
        self, model: nn.Module, x_TB: Tensor, loss_of: LossOf, step: int, rows: Sequence[int]
    ) -> Iterator[LossTerm]:
        steps = x_TB.shape[0]
        backwards = "one" if self.truncate is None else "several"
        with fresh_state(model), slice_cache(model, steps=steps, backwards=backwards) as sharing:
            if self.truncate is not None:
                yield from self._in_pieces(model, x_TB, loss_of, sharing)
            elif self.recompute:
                yield self._computed_twice(model, x_TB, loss_of)
            else:
                logits_TBK = torch.cat([model(x_cB) for x_cB in x_TB.split(self.chunk or steps)])
                loss, mean_logits_BK = self.loss_over_time(logits_TBK, loss_of)
                yield LossTerm(backward=loss, loss=loss.detach(), logits=mean_logits_BK)

    def _in_pieces(
        self, model: nn.Module, x_TB: Tensor, loss_of: LossOf, sharing: Sharing
    ) -> Iterator[LossTerm]:
        steps = x_TB.shape[0]
        for first, x_cB in zip(
            range(0, steps, self.chunk or 1), slices(x_TB, self.chunk), strict=True
        ):
            sharing.is_last = first + len(x_cB) == steps
            loss, share_BK = steps_share(model(x_cB), loss_of, steps=steps)
            yield LossTerm(backward=sharing.carrying(loss), loss=loss.detach(), logits=share_BK)
            for module in carriers(model):
                state: State = module.state  # type: ignore[assignment]
                state.values.update({name: value.detach() for name, value in state.values.items()})

    def _computed_twice(self, model: nn.Module, x_TB: Tensor, loss_of: LossOf) -> LossTerm:
        run = Recomputed(model, x_TB.split(self.chunk or 1))
        with torch.enable_grad():
            logits_TBK = run.forward().requires_grad_()
            loss, mean_logits_BK = self.loss_over_time(logits_TBK, loss_of)
            (error_TBK,) = torch.autograd.grad(loss, logits_TBK)
        return LossTerm(
            backward=run.scalar(loss, error_TBK), loss=loss.detach(), logits=mean_logits_BK
        )
