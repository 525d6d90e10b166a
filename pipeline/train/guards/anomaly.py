"""Batches that a network must not learn from, and what happens in their place.

Before the weights move every rank hears of every other's. A batch is bad whose loss or gradient is
not finite on any of them. With `policy.loss_spike` a batch is also bad if its loss is that many
times the median of the last 64 good ones of its task.

    a bad batch                                  leaves no trace: running statistics, what the rule
                                                 learnt from it and the random numbers are put back,
                                                 as if the run had been told to skip it
                                                 (`Policy.skip`)
    one more than `policy.max_skips` of them in a row   Rollback: the run begins again at its newest
                                                 checkpoint, and from there on skips everything up
                                                 to this batch
    one more than `policy.max_rollbacks` of these       Diverged

Where the weights have moved inside the batch (a rule that moves them at every time step), or ZeRO
holds gradients of its own, a batch cannot be taken back: the first bad one leads to Rollback.

An evaluation whose loss is not finite leads to Rollback as well, and the checkpoint of its step
goes
into quarantine."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from pipeline.core.errors import UserError
from pipeline.core.run_folder import RunFolder
from pipeline.core.units import counted
from pipeline.recipe.recipe import Recipe, read_json, write_json
from pipeline.rules.base import Rule
from pipeline.train.backend.base import Backend
from pipeline.train.backend.collectives import Ranks
from pipeline.train.backend.copies import cloned
from pipeline.train.checkpoint import rng_state, set_rng_state

__all__ = ["Guard", "Rollback", "Skipped", "Unguarded", "is_in", "takes_back"]

WINDOW = 64
"""good losses that a new one is held against, and that there must be before one is"""
"""in a run's folder, once it went back"""


class Rollback(Exception):
    """The run begins again at its newest checkpoint; every rank raises it.

    `skips`: and passes over what led here; where the batches are not to blame it learns from them
    again.
    """

    def __init__(self, step: int, reason: str, *, skips: bool = True) -> None:
        super().__init__(f"batch {step}: {reason}")
        self.step, self.reason, self.skips = step, reason, skips


class _Bad(Exception):
    """A batch that must not be learnt from; every rank raises it."""


@dataclass(frozen=True)
class Skipped:
    """What going back has decided so far."""

    rollbacks: int = 0
    batches: tuple[tuple[int, int], ...] = ()
    """from one up to and without another"""

    def after(self, back: Rollback, *, saved: int) -> Skipped:
        """One more time, to the checkpoint behind `saved` batches."""
        return Skipped(
            self.rollbacks + 1,
            (*self.batches, (saved, back.step + 1)) if back.skips else self.batches,
        )

    def further(self, other: Skipped) -> Skipped:
        """Whichever has gone back more often: the other is what it was before."""
        return max(self, other, key=lambda each: each.rollbacks)

    @classmethod
    def of(cls, value: Any) -> Skipped:
        """As `asdict` tells it, and JSON keeps it.

        Raises: KeyError, TypeError, ValueError: it is something else.
        """
        return cls(
            int(value["rollbacks"]),
            tuple((int(first), int(end)) for first, end in value["batches"]),
        )

    @classmethod
    def read(cls, run: Path) -> Skipped:
        file = RunFolder(run).skipped
        if not file.exists():
            return cls()
        value = read_json(file)
        try:
            return cls.of(value)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file}: must hold rollbacks and batches; got {value!r}") from error

    def write(self, run: Path) -> None:
        write_json(RunFolder(run).skipped, asdict(self))


def is_in(step: int, batches: Sequence[tuple[int, int]]) -> bool:
    return any(first <= step < end for first, end in batches)


def takes_back(recipe: Recipe, rule: Rule) -> bool:
    """Whether a bad batch can be taken back, as above."""
    return rule.update == "batch" and recipe.zero == 0


class Guard:
    """Of one rank; all ranks make one and ask it equally often.

    Args:
        spike: so many medians are too much; 0: what is finite is good.
        skips: bad batches in a row that are skipped.
        takes_back: whether a bad batch can be.
        on_skip: told (step, reason) of each bad batch that is skipped.
        state: what `told` said in the checkpoint that was restored.
    """

    def __init__(
        self,
        backend: Backend,
        rule: Rule,
        ranks: Ranks,
        *,
        spike: float = 0.0,
        skips: int = 3,
        takes_back: bool = True,
        on_skip: Callable[[int, str], None] = lambda step, reason: None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.backend, self.rule, self.ranks = backend, rule, ranks
        self.spike, self.skips, self.takes_back, self.on_skip = spike, skips, takes_back, on_skip
        self._in_a_row = 0
        self._good: deque[float] = deque(maxlen=WINDOW)
        if state is not None:
            self._in_a_row = int(state["in_a_row"])
            self._good.extend(float(loss) for loss in state["losses"])
        self._before: _Before | None = None
        self._losses: list[Tensor] = []
        self._loss = math.nan

    def told(self) -> dict[str, Any]:
        """For a checkpoint: a run that is resumed judges the next batch as it would have."""
        return {"in_a_row": self._in_a_row, "losses": list(self._good)}

    def begin_task(self) -> None:
        """What comes is another task, whose losses are not held against those of the one before."""
        self._in_a_row = 0
        self._good.clear()

    @contextmanager
    def batch(self, step: int) -> Iterator[None]:
        """Surrounds a batch. Raises Rollback, on every rank."""
        self._losses = []
        try:
            yield
        except _Bad as bad:
            self._in_a_row += 1
            if self._before is None or self._in_a_row > self.skips:
                raise Rollback(step, str(bad)) from bad
            self._before.put_back()
            self.on_skip(step, str(bad))
        else:
            self._in_a_row = 0
            self._good.append(self._loss)
        finally:
            self._before = None

    def keep(self) -> None:
        """Copy what a batch changes beside the weights, as large as what the rule has learnt,
        inside what is measured.
        """
        if self.takes_back:
            self._before = _Before(self.backend, self.rule)

    def add(self, loss: Tensor, share: float) -> None:
        """A part of the batch's loss; parts weighted by their shares sum to it over micro-batches
        and ranks.
        """
        self._losses.append(loss.detach() * share)

    def check(self) -> None:
        """Between the backward calls and the step that they lead to; collective."""
        why = self.verdict()
        if why is not None:
            raise _Bad(why)

    def verdict(self) -> str | None:
        """Why the batch is bad, of whose loss and gradients every rank hears; None: it is good.
        Collective.
        """
        loss = torch.stack(self._losses).sum(dtype=torch.float64)
        gradients = self.backend.gradients()
        if not gradients:  # and nothing would be found of them
            raise RuntimeError(
                f"guard: a batch must leave gradients to look at; {self.backend.name} shows none"
            )
        size = get_total_norm(gradients, math.inf)
        bad, unsolved = (~size.isfinite()).to(loss), loss.new_tensor(self.rule.is_unsolved())
        self._loss, ranks, gave_up = self.ranks.sum(torch.stack([loss, bad, unsolved])).tolist()
        if not math.isfinite(self._loss):
            return f"its loss is {self._loss}"
        if ranks:
            why = f": {self.rule.label} could not solve for it on {gave_up:.0f}" if gave_up else ""
            return (
                f"its gradient is not finite on {ranks:.0f} of"
                f" {counted(self.ranks.size, 'worker')}{why}"
            )
        if (
            self.spike
            and len(self._good) == WINDOW
            and self._loss > self.spike * (usual := statistics.median(self._good))
        ):
            return (
                f"its loss of {self._loss:.4g} is more than {self.spike:g} times the usual"
                f" {usual:.4g}"
            )
        return None


class _Before:
    """What a batch changes beside the weights, as it was."""

    def __init__(self, backend: Backend, rule: Rule) -> None:
        self.backend, self.rule = backend, rule
        self.buffers = cloned(dict(backend.network.named_buffers()))
        self.rule_state = cloned(rule.state_dict())
        self.rng = rng_state()

    def put_back(self) -> None:
        for name, buffer in self.backend.network.named_buffers():
            buffer.copy_(self.buffers[name])
        if self.rule_state:
            self.rule.load_state_dict(self.rule_state)
        set_rng_state(self.rng)
        self.backend.discard()


class Unguarded:
    """Learns from whatever comes: where a loop is measured, or held to another."""

    def batch(self, step: int) -> AbstractContextManager[None]:
        return nullcontext()

    def keep(self) -> None:
        pass

    def add(self, loss: Tensor, share: float) -> None:
        pass

    def check(self) -> None:
        pass
