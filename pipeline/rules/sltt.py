"""Spatial Learning Through Time: a backward at each time step, through layers but not time."""

# T time, B batch, K classes

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts, require
from pipeline.core.random import counter_hash
from pipeline.rules.base import (
    LossFn,
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

    x[t] is the synapse's input, and u[t] is the membrane before the reset in the next neurons
    (`spiking/neuron.py`).

    Args:
        k: the number of time steps with a backward; None: all. For each batch, S is a random subset
            of k steps, drawn from (seed, step) alone. The other steps run without a graph; their
            loss terms have `backward=None`. The sum is divided by T, as published, so the expected
            gradient is k/T times that of SLTT.
        chunk: the number of time steps per forward and backward. A larger chunk needs more memory
            and is faster on most devices. The gradient is the same.
        rescale: whether the gradients, but not the reported losses, are multiplied by T/k.

    Raises: ValueError for k or chunk below 1, or rescale without k (`__init__`); for a loss over
    mean logits, a model without LIF, or a module that needs all T steps in one call (`attach`); for
    k or chunk above T, or chunk > 1 with k < T (`check_steps`).
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
            f"{self.label}: the model must have LIF neurons, because the rule detaches their"
            f" membranes; got {type(model).__name__}",
        )
        super().attach(model, world=world, over_time=over_time)
        detach_between_steps(self, model)

    def check_steps(self, steps: int) -> None:
        k = steps if self.k is None else self.k
        require(k <= steps, f"SLTT: k must be in 1..T; got k={k}, T={steps}")
        super().check_steps(steps)
        require(
            k >= steps or self.chunk == 1,
            f"SLTT: chunk must be 1 if k < T, because single steps are selected; got k={k},"
            f" T={steps}, chunk={self.chunk}",
        )

    def _loss_terms(
        self, model: nn.Module, x_TB: Tensor, loss_fn: LossFn, step: int, rows: Sequence[int]
    ) -> Iterator[LossTerm]:
        steps = x_TB.shape[0]
        k = steps if self.k is None else self.k
        selected = selected_steps(steps, k, seed=self.world.seed, step=step)
        last_slice = selected[-1] // (self.chunk or steps)
        with fresh_state(model), slice_cache(model, steps=steps, backwards="several") as cache:
            for index, x_cB in enumerate(slices(x_TB, self.chunk)):
                is_selected = index in selected
                cache.is_last = index == last_slice
                # The block ends before the yield. Otherwise the suspended generator would disable
                # gradients in the caller.
                with torch.set_grad_enabled(is_selected and torch.is_grad_enabled()):
                    loss, logits_BK = slice_loss(model(x_cB), loss_fn, steps=steps)
                    backward = None
                    if is_selected:
                        scaled_loss = loss * (steps / k) if self.rescale else loss
                        backward = cache.with_gradients(scaled_loss)
                yield LossTerm(backward=backward, loss=loss.detach(), logits=logits_BK)


def selected_steps(steps: int, k: int, *, seed: int, step: int) -> tuple[int, ...]:
    """A random subset of k time steps of 0..steps-1 for batch `step`, in time order.

    Every subset has the same probability: each time step t has a hash of (seed, step, t), and the k
    steps with the smallest hashes are selected.
    """
    by_hash = sorted(range(steps), key=lambda t: counter_hash(seed, step, t))
    return tuple(sorted(by_hash[:k]))
