"""Backpropagation through time: the baseline every other rule stands beside."""

# T time, B batch, K classes

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pipeline.rules.base import LossOf, Objective, OverTime, Rule, steps_share
from pipeline.spiking.state import fresh_state


class BPTT(Rule):
    """One backward through all T steps; the whole sequence is kept for it.

        L = 1/T sum_t loss_of(o[t])  (over_time "steps")      or      loss_of(1/T sum_t o[t])  (over_time "mean")

    `chunk` is the number of steps per forward call, None for all T at once: the same graph, built in slices.

    Raises: ValueError when chunk is not in 1..T.
    Source: Neftci et al. 2019 (arXiv 1901.09948) for the surrogate gradient through time.
    """

    memory: ClassVar[Literal["constant", "linear"]] = "linear"
    over_time_choices: ClassVar[tuple[OverTime, ...]] = ("steps", "mean")

    def __init__(self, chunk: int | None = None) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise ValueError(f"BPTT: chunk must be in 1..T; got chunk={chunk}")
        self.chunk = chunk

    def check_steps(self, steps: int) -> None:
        if self.chunk is not None and self.chunk > steps:
            raise ValueError(f"BPTT: chunk must be in 1..T; got chunk={self.chunk}, T={steps}")

    def _objectives(self, model: nn.Module, x_TB: Tensor, loss_of: LossOf, step: int, rows: Sequence[int]) -> Iterator[Objective]:
        steps = x_TB.shape[0]
        with fresh_state(model):
            logits_TBK = torch.cat([model(x_cB) for x_cB in x_TB.split(self.chunk or steps)])
            if self.over_time == "steps":
                loss, mean_logits_BK = steps_share(logits_TBK, loss_of, steps=steps)
            else:
                loss, mean_logits_BK = loss_of(logits_TBK.mean(0)), logits_TBK.detach().mean(0)
            yield Objective(backward=loss, loss=loss.detach(), logits=mean_logits_BK)
