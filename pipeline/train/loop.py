"""One batch of training, written like the algorithm in a paper. Start reading here.

T time, B batch, C channels, H W pixels, K classes
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from torch import Tensor

from pipeline.measure.meters import Meters
from pipeline.rules.base import Rule
from pipeline.train.backend.base import Backend
from pipeline.train.objective import Loss


class MicroBatch(NamedTuple):
    """The samples of a global batch that one worker holds at a time."""

    x_TB: Tensor
    target_B: Tensor  # classes [B], or shares of the classes [B,K]
    # The positions of the samples in the global batch. A rule's random draws depend on these
    # positions, and not on the number of ranks.
    rows: range
    share: float  # weight of this micro-batch; shares sum to 1 over ranks and micro-batches
    teacher_BK: Tensor | None = None  # the teacher's logits, if there is a teacher


class Guard:
    """Decides whether a batch may change the weights. This base class accepts every batch."""

    def batch(self, step: int) -> AbstractContextManager[None]:
        """A context around a batch."""
        return nullcontext()

    def keep(self) -> None:
        """Copy the state that is needed to undo the batch. Called at the start of the batch."""

    def add(self, loss: Tensor, share: float) -> None:
        """Record a loss term. The loss of the batch is the sum of the terms times their shares,
        over micro-batches and ranks.
        """

    def check(self) -> Tensor | bool:
        """Whether the batch is bad, in the form that `Backend.step` accepts. The effects of a bad
        batch on buffers and on the rule are undone. Called before each optimizer step. Collective.
        """
        return False


def train_batch(
    rule: Rule,
    backend: Backend,
    schedule: Callable[[int], None],
    step: int,
    micro_batches: Iterable[MicroBatch],
    loss_for: Loss,
    meters: Meters,
    guard: Guard,
) -> None:
    """Train on global batch `step`. `micro_batches` are this worker's part. Collective."""
    with guard.batch(step), meters.batch(step):
        with meters.part("metrics"):
            guard.keep()
        with meters.part("optimizer"):
            schedule(step)
        for x_TB, target_B, rows, share, teacher_BK in micro_batches:
            loss_terms = rule.loss_terms(
                backend.model, x_TB, loss_for(target_B, teacher_BK), step=step, rows=rows
            )
            for term in meters.each("forward", loss_terms):
                meters.add(term)
                if term.backward is not None:  # in SLTT-K, only K of the T losses have a gradient
                    with meters.part("backward"):
                        backend.backward(term.backward, share)
                guard.add(term.loss, share)
                if rule.update == "step":  # OTTT-O moves the weights at every time step
                    _move_weights(backend, meters, guard)
            meters.end_of_micro_batch(target_B, share)
        with meters.part("backward"):
            rule.end_of_batch()
        if rule.update == "batch":
            _move_weights(backend, meters, guard)


def _move_weights(backend: Backend, meters: Meters, guard: Guard) -> None:
    with meters.part("metrics"):
        bad = guard.check()
    with meters.part("optimizer"):
        backend.step(bad)
