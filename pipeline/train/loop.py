"""The training loop. It reads like the algorithm box of a paper; data, backend and meters are
Protocols to it.

T time, B batch, C channels, H W pixels, K classes
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, Protocol, TypeVar

from torch import Tensor

from pipeline.rules.base import LossTerm, Rule
from pipeline.train.backend.base import Backend
from pipeline.train.objective import Loss

T_ = TypeVar("T_")


class MicroBatch(NamedTuple):
    """What one worker holds of a global batch at a time."""

    x_TB: Tensor
    target_B: Tensor
    """a class [B], or shares of the classes [B,K]"""
    rows: range
    """place of each sample in the global batch: what a rule draws for a sample depends on it, never
    on ranks
    """
    share: float
    """of the global batch: a weight; shares sum to 1 over ranks and micro-batches"""
    teacher_BK: Tensor | None = None
    """what a teacher answers, where there is one: asked once, whatever T and the rule"""


class Meters(Protocol):
    """What the loop tells whoever measures."""

    def batch(self, step: int) -> AbstractContextManager[None]:
        """Surrounds everything that one global batch costs, the wait for its data included."""
        ...

    def part(
        self, name: Literal["backward", "optimizer", "metrics"]
    ) -> AbstractContextManager[None]:
        """Surrounds a part of it."""
        ...

    def each(self, name: Literal["forward"], source: Iterable[T_]) -> Iterator[T_]:
        """`source`, with what it takes to make each next one as a part."""
        ...

    def add(self, term: LossTerm, /) -> None:
        """Before its backward, which frees what the forward has kept for it."""
        ...

    def end_of_micro_batch(self, target_B: Tensor, share: float) -> None: ...


class Guard(Protocol):
    """What the loop asks before a batch moves the weights."""

    def batch(self, step: int) -> AbstractContextManager[None]:
        """Surrounds a batch, and ends it without a trace where it must not be learnt from."""
        ...

    def keep(self) -> None:
        """First of all in a batch: whatever it takes to end it without a trace."""
        ...

    def add(self, loss: Tensor, share: float) -> None: ...

    def check(self) -> None:
        """Before every step; leaves the batch where it must not be learnt from."""
        ...


def train(
    rule: Rule,
    backend: Backend,
    schedule: Callable[[int], None],
    batches: Iterable[tuple[int, Iterable[MicroBatch]]],
    loss_for: Loss,
    meters: Meters,
    guard: Guard,
) -> None:
    """Train on `batches` of (step, micro-batches): one global batch each, workers x accumulated
    micro-batches.
    """
    for step, micro_batches in batches:
        with guard.batch(step), meters.batch(step):
            with meters.part("metrics"):
                guard.keep()
            with meters.part("optimizer"):
                schedule(step)
            for x_TB, target_B, rows, share, teacher_BK in micro_batches:
                loss_of = loss_for(target_B, teacher_BK)
                loss_terms = rule.loss_terms(backend.model, x_TB, loss_of, step=step, rows=rows)
                for objective in meters.each("forward", loss_terms):
                    meters.add(objective)
                    if (
                        objective.backward is not None
                    ):  # SLTT-K reports T steps and differentiates K
                        with meters.part("backward"):
                            backend.backward(objective.backward, share)
                    guard.add(objective.loss, share)
                    if rule.update == "step":  # OTTT-O moves the weights at every time step
                        _move(backend, meters, guard)
                meters.end_of_micro_batch(target_B, share)
            with meters.part("backward"):
                rule.end_of_batch()
            if rule.update == "batch":
                _move(backend, meters, guard)


def _move(backend: Backend, meters: Meters, guard: Guard) -> None:
    with meters.part("metrics"):
        guard.check()
    with meters.part("optimizer"):
        backend.step()
