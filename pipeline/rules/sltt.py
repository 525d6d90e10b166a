"""Spatial Learning Through Time: a backward at each step, through the layers but not time."""

# T time, B batch, K classes

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts, require
from pipeline.core.random import counter_hash
from pipeline.rules.base import (
    LossOf,
    LossTerm,
    OverTime,
    Rule,
    World,
    detach_between_steps,
    slice_loss,
    slices,
)
from pipeline.spiking.neuron import named_neurons
from pipeline.spiking.slice_cache import slice_cache
from pipeline.spiking.state import fresh_state


class SLTT(Rule):
    """SLTT, and SLTT-K with `k`: the membrane is detached between time steps.

        grad W = 1/T sum_{t in S} g[t] x[t]^T,   g[t] = dL[t]/du[t] within step t
        S = all steps, or k of them

    x[t] is the synapse's input and u[t] the potential that it feeds (`spiking/neuron.py`).

    S is a uniform k-subset of the T steps. It is drawn for each batch from (seed, step) alone. The
    other steps run without a graph, update the state, and are reported with `backward=None`. The
    divisor stays T as published, so the expected gradient is k/T of SLTT's. `rescale` multiplies
    the gradients, not the reported losses, by T/k. With `chunk`, that many steps share one forward
    and one backward: more memory, better use of the device, the same gradient.

    Raises: ValueError for k or chunk below 1 and for rescale without k (when made); for a loss over
    mean logits, a model without LIF, and a norm that mixes time steps (`attach`); for k or chunk
    above T, and chunk > 1 with k < T (`check_steps`).
    Source: Meng et al. 2023 (arXiv 2302.14311), eq. 8 and section 4.3.
    """

    memory = "constant"

    def __init__(self, k: int | None = None, *, chunk: int = 1, rescale: bool = False) -> None:
        super().__init__()
        refuse_unless_counts(
            "SLTT", {"chunk": chunk} if k is None else {"k": k, "chunk": chunk}, up_to="T"
        )
        require(
            not rescale or k is not None,
            "SLTT: rescale multiplies by T/k, so it needs a k; got k=None",
        )
        self.k = k
        self.chunk = chunk
        self.rescale = rescale
        self.label = "SLTT" if k is None else f"SLTT-{k}"

    def attach(
        self, model: nn.Module, *, world: World = World(), over_time: OverTime = "steps"
    ) -> None:
        require(
            named_neurons(model),
            f"{self.label}: the model must have LIF neurons, whose membrane is cut; got"
            f" {type(model).__name__}",
        )
        super().attach(model, world=world, over_time=over_time)
        detach_between_steps(self, model)

    def check_steps(self, steps: int) -> None:
        k = steps if self.k is None else self.k
        require(k <= steps, f"SLTT: k must be in 1..T; got k={k}, T={steps}")
        super().check_steps(steps)
        require(
            k >= steps or self.chunk == 1,
            f"SLTT: k < T selects single steps, so chunk must be 1; got k={k}, T={steps},"
            f" chunk={self.chunk}",
        )

    def _loss_terms(
        self, model: nn.Module, x_TB: Tensor, loss_of: LossOf, step: int, rows: Sequence[int]
    ) -> Iterator[LossTerm]:
        steps = x_TB.shape[0]
        k = steps if self.k is None else self.k
        selected = selected_steps(steps, k, seed=self.world.seed, step=step)
        last = selected[-1] // (self.chunk or steps)
        with fresh_state(model), slice_cache(model, steps=steps, backwards="several") as cache:
            for index, x_cB in enumerate(slices(x_TB, self.chunk)):
                learns = k == steps or index in selected
                cache.is_last = index == last
                # The block ends before the yield. Otherwise the suspended generator would disable
                # gradients in the caller.
                with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
                    logits_TBK = model(x_cB)
                    loss, share_BK = slice_loss(logits_TBK, loss_of, steps=steps)
                    backward = (
                        cache.with_gradients(loss * (steps / k) if self.rescale else loss)
                        if learns
                        else None
                    )
                yield LossTerm(backward=backward, loss=loss.detach(), logits=share_BK)


def selected_steps(steps: int, k: int, *, seed: int, step: int) -> tuple[int, ...]:
    """The sorted k time steps of 0..steps-1 that batch `step` learns from.

    Every k-subset is equally likely.

    Each time step draws 64 bits from (seed, step, t), and the k smallest are selected.
    """
    return tuple(sorted(sorted(range(steps), key=lambda t: counter_hash(seed, step, t))[:k]))
