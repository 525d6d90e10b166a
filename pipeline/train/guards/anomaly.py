"""Bad batches: their detection, and their removal from training.

Before the weights move, the ranks combine their losses and the checks of their gradients. A batch
is bad if its loss or gradient is not finite on any rank. With `policy.loss_spike` it is also bad if
its loss is more than that many times the median of the last 64 good losses of its task.

    a bad batch                      `SkipBatch`: it leaves no trace. Running statistics, the
                                     rule's state and the random numbers are restored, as if
                                     `Policy.skip` had named the batch
    `policy.max_skips` + 1 in a row  `Rollback` (recovery.py)
    `policy.max_rollbacks` + 1       `Diverged`

A batch cannot be undone if the weights have moved inside it (a rule with update="step"), or if ZeRO
holds gradients of its own. The first bad one then leads to Rollback. An evaluation whose loss is
not finite leads to Rollback as well, and the checkpoint of its step goes into quarantine.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from pipeline.core.units import counted
from pipeline.recipe.recipe import Recipe
from pipeline.rules.base import Rule
from pipeline.train.backend.base import Backend, cloned
from pipeline.train.backend.collectives import Ranks
from pipeline.train.checkpoint import rng_state, set_rng_state
from pipeline.train.loop import Guard
from pipeline.train.recovery import Rollback, SkipBatch

WINDOW = 64  # good losses that a new loss is compared with; with fewer there is no comparison


def can_undo(recipe: Recipe, rule: Rule) -> bool:
    """Whether a bad batch can be undone, as above."""
    return rule.update == "batch" and recipe.zero == 0


class AnomalyGuard(Guard):
    """One per rank. Every method must be called equally often on every rank.

    Args:
        spike: a loss above this many medians is bad; 0: every finite loss is good.
        max_skips: bad batches in a row that are skipped.
        can_undo: whether a bad batch can be undone.
        on_skip: called with (step, reason) of each bad batch that is skipped.
        state: the `state_dict` in the checkpoint that was restored.
    """

    def __init__(
        self,
        backend: Backend,
        rule: Rule,
        ranks: Ranks,
        *,
        spike: float = 0.0,
        max_skips: int = 3,
        can_undo: bool = True,
        on_skip: Callable[[int, str], None] = lambda step, reason: None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.backend, self.rule, self.ranks = backend, rule, ranks
        self.spike, self.max_skips, self.can_undo = spike, max_skips, can_undo
        self.on_skip = on_skip
        state = state or {"in_a_row": 0, "losses": ()}
        self._in_a_row = int(state["in_a_row"])
        self._good: deque[float] = deque(map(float, state["losses"]), maxlen=WINDOW)
        self._undo: Callable[[], None] | None = None
        self._losses: list[Tensor] = []
        self._loss = math.nan

    def state_dict(self) -> dict[str, Any]:
        """The state with which a resumed run judges the next batch as this run would."""
        return {"in_a_row": self._in_a_row, "losses": list(self._good)}

    def begin_task(self) -> None:
        """Forget the losses so far: those of another task are not compared with them."""
        self._in_a_row = 0
        self._good.clear()

    @contextmanager
    def batch(self, step: int) -> Iterator[None]:
        """See `Guard.batch`. Raises: Rollback, on every rank."""
        self._losses = []
        try:
            yield
        except SkipBatch as bad:
            self._in_a_row += 1
            if self._undo is None or self._in_a_row > self.max_skips:
                raise Rollback(step, str(bad)) from bad
            self._undo()
            self.on_skip(step, str(bad))
        else:
            self._in_a_row = 0
            self._good.append(self._loss)
        finally:
            self._undo = None

    def keep(self) -> None:
        if not self.can_undo:
            return
        buffers = cloned(dict(self.backend.network.named_buffers()))
        rule_state, rng = cloned(self.rule.state_dict()), rng_state()

        def undo() -> None:
            for name, buffer in self.backend.network.named_buffers():
                buffer.copy_(buffers[name])
            if rule_state:
                self.rule.load_state_dict(rule_state)
            set_rng_state(rng)
            self.backend.discard()

        self._undo = undo

    def add(self, loss: Tensor, share: float) -> None:
        self._losses.append(loss.detach() * share)

    def check(self) -> None:
        """Judge the batch by the losses and gradients of all ranks. Raises: SkipBatch."""
        loss = torch.stack(self._losses).sum(dtype=torch.float64)
        gradients = self.backend.gradients()
        if not gradients:
            raise RuntimeError(
                f"guard: a batch must leave gradients to look at; {self.backend.name} shows none"
            )
        size = get_total_norm(gradients, math.inf)
        bad, unsolved = (~size.isfinite()).to(loss), loss.new_tensor(self.rule.is_unsolved())
        self._loss, ranks, gave_up = self.ranks.sum(torch.stack([loss, bad, unsolved])).tolist()
        if not math.isfinite(self._loss):
            raise SkipBatch(f"its loss is {self._loss}")
        if ranks:
            why = f": {self.rule.label} could not solve for it on {gave_up:.0f}" if gave_up else ""
            raise SkipBatch(
                f"its gradient is not finite on {ranks:.0f} of"
                f" {counted(self.ranks.size, 'worker')}{why}"
            )
        if (
            self.spike
            and len(self._good) == WINDOW
            and self._loss > self.spike * (usual := statistics.median(self._good))
        ):
            raise SkipBatch(
                f"its loss of {self._loss:.4g} is more than {self.spike:g} times the usual"
                f" {usual:.4g}"
            )
