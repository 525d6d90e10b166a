"""Detects bad batches and undoes them.

Before the weights move, the ranks combine their losses and the checks of their gradients. A batch
is bad if its loss or gradient is not finite on any rank. If `policy.loss_spike` is not 0, a batch
is also bad if its loss is more than `policy.loss_spike` times the median loss of the last 64 good
batches of the task.

    a bad batch                      `SkipBatch`: buffers, the rule's state and the random number
                                     generators are restored, as if `policy.skip` named the batch
    `policy.max_skips` + 1 in a row  `Rollback` (recovery.py)
    `policy.max_rollbacks` + 1       `Diverged`

A batch cannot be undone under a rule with update="step", which moves the weights inside the batch.
Nor can it be undone at ZeRO-1 and ZeRO-2, which hold gradients of their own. In these cases, the
first bad batch leads to a rollback. An evaluation with a loss that is not finite also leads to a
rollback, and the checkpoint of that step is moved to quarantine.
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
from pipeline.train.backend.base import Backend, clone_tensors
from pipeline.train.backend.collectives import Ranks
from pipeline.train.checkpoint import rng_state, set_rng_state
from pipeline.train.loop import Guard
from pipeline.train.recovery import Rollback, SkipBatch

WINDOW = 64  # number of good losses in the median; with fewer, no loss counts as a spike


def can_undo(recipe: Recipe, rule: Rule) -> bool:
    return rule.update == "batch" and recipe.zero == 0


class AnomalyGuard(Guard):
    """The guard of one rank. All ranks must call the same methods equally often.

    Args:
        spike: a batch is bad if its loss is more than `spike` times the median; 0: every finite
            loss is good.
        max_skips: the number of bad batches in a row that are skipped.
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
        self._bad_in_a_row = int(state["in_a_row"])
        self._good_losses: deque[float] = deque(map(float, state["losses"]), maxlen=WINDOW)
        self._undo: Callable[[], None] | None = None
        self._loss_terms: list[Tensor] = []  # of this rank, each weighted by its share
        self._loss = math.nan  # of the batch, over all ranks

    def state_dict(self) -> dict[str, Any]:
        """The state with which a resumed run judges the next batch as this run would."""
        return {"in_a_row": self._bad_in_a_row, "losses": list(self._good_losses)}

    def begin_task(self) -> None:
        """Forget the good losses and the count of bad batches: tasks are not compared."""
        self._bad_in_a_row = 0
        self._good_losses.clear()

    @contextmanager
    def batch(self, step: int) -> Iterator[None]:
        """See `Guard.batch`.

        Raises:
            Rollback: the batch is bad and is not skipped. Every rank raises it.
        """
        self._loss_terms = []
        try:
            yield
        except SkipBatch as error:
            self._bad_in_a_row += 1
            if self._undo is None or self._bad_in_a_row > self.max_skips:
                raise Rollback(step, str(error)) from error
            self._undo()
            self.on_skip(step, str(error))
        else:
            self._bad_in_a_row = 0
            self._good_losses.append(self._loss)
        finally:
            self._undo = None

    def keep(self) -> None:
        if not self.can_undo:
            return
        buffers = clone_tensors(dict(self.backend.network.named_buffers()))
        rule_state, rng = clone_tensors(self.rule.state_dict()), rng_state()

        def undo() -> None:
            for name, buffer in self.backend.network.named_buffers():
                buffer.copy_(buffers[name])
            if rule_state:
                self.rule.load_state_dict(rule_state)
            set_rng_state(rng)
            self.backend.zero_grad()

        self._undo = undo

    def add(self, loss: Tensor, share: float) -> None:
        self._loss_terms.append(loss.detach() * share)

    def check(self) -> None:
        """Judge the batch by the losses and gradients of all ranks.

        Raises:
            SkipBatch: the batch is bad. Every rank raises it.
            RuntimeError: the backend has no gradients.
        """
        loss = torch.stack(self._loss_terms).sum(dtype=torch.float64)
        gradients = self.backend.gradients()
        if not gradients:
            raise RuntimeError(
                f"guard: backend {self.backend.name} must have gradients after a batch; got none"
            )
        is_bad = (~get_total_norm(gradients, math.inf).isfinite()).to(loss)
        is_unsolved = loss.new_tensor(self.rule.is_unsolved())
        sums = self.ranks.sum(torch.stack([loss, is_bad, is_unsolved]))
        self._loss, bad_ranks, unsolved_ranks = sums.tolist()
        if not math.isfinite(self._loss):
            raise SkipBatch(f"its loss is {self._loss}")
        if bad_ranks:
            reason = f": {self.rule.label} could not solve for it on {unsolved_ranks:.0f}"
            raise SkipBatch(
                f"its gradient is not finite on {bad_ranks:.0f} of"
                f" {counted(self.ranks.size, 'worker')}{reason if unsolved_ranks else ''}"
            )
        if self.spike and len(self._good_losses) == WINDOW:
            median = statistics.median(self._good_losses)
            if self._loss > self.spike * median:
                raise SkipBatch(
                    f"its loss of {self._loss:.4g} is more than {self.spike:g} times the median"
                    f" of {median:.4g}"
                )
