"""Detects bad batches and undoes them.

Before the weights move, the ranks combine their losses and the checks of their gradients. A batch
is bad if its loss or gradient is not finite on any rank. If `policy.loss_spike` is not 0, a batch
is also bad if its loss is more than `policy.loss_spike` times the median loss of the last 64 good
batches of the task.

    a bad batch                      weights, optimizer, buffers and the rule's state stay as they
                                     were, as if `policy.skip` named the batch
    `policy.max_skips` + 1 in a row  `Rollback` (recovery.py)
    `policy.max_rollbacks` + 1       `Diverged`

Where the optimizer can skip a step on the device (`Backend.skips_on_device`), the device decides,
and the host reads one batch later whether the batch was bad. So the host never waits for the GPU's
current batch. The host waits in the first batches of an attempt and of a task, until one is good:
that batch creates momentum and a rule's matrices, and the device cannot undo what did not exist.

A batch cannot be undone under a rule with update="step", which moves the weights inside the batch.
Nor can it be undone at ZeRO-1 and ZeRO-2, which hold gradients of their own. In these cases, the
first bad batch leads to a rollback. An evaluation with a loss that is not finite also leads to a
rollback, and the checkpoint of that step is moved to quarantine.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from pipeline.core.units import counted
from pipeline.recipe.recipe import Recipe
from pipeline.rules.base import Rule
from pipeline.train.backend.base import Backend, clone_tensors, restore_where
from pipeline.train.backend.collectives import Ranks
from pipeline.train.loop import Guard
from pipeline.train.recovery import Rollback

WINDOW = 64  # number of good losses in the median; with fewer, no loss counts as a spike


def can_undo(recipe: Recipe, rule: Rule) -> bool:
    return rule.update == "batch" and recipe.zero == 0


class _Verdict(NamedTuple):
    """What the device found about one batch. Every value is a number over all ranks."""

    loss: float
    bad_ranks: float  # the number of ranks with a gradient that is not finite
    unsolved_ranks: float  # the number of ranks on which the rule could not solve for a gradient
    median: float  # of the good losses before; NaN if there are fewer than WINDOW
    is_bad: float  # 0 or 1


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
        losses = [math.nan] * (WINDOW - len(state["losses"])) + [*state["losses"]]
        device = next(backend.network.parameters()).device
        # Losses of good batches, the last one last; NaN: there was none.
        self._good_losses_W = torch.tensor(losses, dtype=torch.float64, device=device)
        self._has_moved = False  # whether a good batch of this attempt and task has ended
        self._loss_terms: list[Tensor] = []  # of this rank, each weighted by its share
        self._kept: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
        self._step = -1
        self._verdict = torch.empty(0)
        # The batches about which the host knows nothing yet: the step, the verdict, and the event
        # after which the host can read it.
        self._unread: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def state_dict(self) -> dict[str, Any]:
        """The state with which a resumed run judges the next batch as this run would. It reads
        every verdict.
        """
        self.settle()
        losses = [loss for loss in self._good_losses_W.tolist() if not math.isnan(loss)]
        return {"in_a_row": self._bad_in_a_row, "losses": losses}

    def begin_task(self) -> None:
        """Forget the good losses and the count of bad batches: tasks are not compared."""
        self.settle()
        self._bad_in_a_row, self._has_moved = 0, False
        self._good_losses_W.fill_(math.nan)

    @contextmanager
    def batch(self, step: int) -> Iterator[None]:
        """See `Guard.batch`.

        Raises:
            Rollback: this batch or the one before is bad and is not skipped. Every rank raises it.
        """
        self._step, self._loss_terms, self._kept = step, [], None
        decides_on_device = self._decides_on_device
        yield
        loss, is_bad = self._verdict[0], self._verdict[-1] > 0
        self._good_losses_W = torch.where(
            is_bad, self._good_losses_W, torch.cat([self._good_losses_W[1:], loss.view(1)])
        )
        self._unread.append((step, *_on_host(self._verdict)))
        self._kept = None
        self.settle(but=1 if decides_on_device else 0)

    @property
    def _decides_on_device(self) -> bool:
        return self.can_undo and self.backend.skips_on_device and self._has_moved

    def settle(self, *, but: int = 0) -> None:
        """Read the verdicts on all batches but the last `but`.

        Raises:
            Rollback: a batch is bad and is not skipped. Every rank raises it.
        """
        while len(self._unread) > but:
            step, values, is_copied = self._unread.popleft()
            if is_copied is not None:
                is_copied.synchronize()
            verdict = _Verdict(*values.tolist())
            if not verdict.is_bad:
                self._bad_in_a_row, self._has_moved = 0, True
                continue
            self._bad_in_a_row += 1
            if not self._unread:  # the newest batch: the rule's statistics are of it
                self.rule.begin_batch()
            reason = self._reason(verdict)
            if self._bad_in_a_row > self.max_skips:
                raise Rollback(step, reason)
            self.on_skip(step, reason)

    def keep(self) -> None:
        if self.can_undo:
            buffers = dict(self.backend.network.named_buffers())
            self._kept = clone_tensors(buffers), clone_tensors(self.rule.state_dict())

    def add(self, loss: Tensor, share: float) -> None:
        self._loss_terms.append(loss.detach() * share)

    def check(self) -> Tensor | bool:
        """See `Guard.check`. The batch is judged by the losses and gradients of all ranks.

        Raises:
            Rollback: the batch is bad and cannot be undone. Every rank raises it.
            RuntimeError: the backend has no gradients.
        """
        self._verdict = self._judge()
        if self._decides_on_device:
            assert self._kept is not None
            buffers, rule_state = self._kept
            is_bad = self._verdict[-1].float()
            restore_where(is_bad, dict(self.backend.network.named_buffers()), buffers)
            on_device = {
                name: value
                for name, value in self.rule.state_dict().items()
                if value.device == is_bad.device  # a batch changes no other value
            }
            restore_where(is_bad, on_device, rule_state)
            return is_bad
        is_bad = bool(self._verdict[-1])
        if is_bad and self._kept is None:
            raise Rollback(self._step, self._reason(_Verdict(*self._verdict.tolist())))
        if is_bad and self._kept is not None:
            buffers, rule_state = self._kept
            for name, buffer in self.backend.network.named_buffers():
                buffer.copy_(buffers[name])
            if self.rule.state_dict():
                self.rule.load_state_dict(rule_state)
        return is_bad

    def _judge(self) -> Tensor:
        """The fields of `_Verdict` on the device."""
        loss = torch.stack(self._loss_terms).sum(dtype=torch.float64)
        gradients = self.backend.gradients()
        if not gradients:
            raise RuntimeError(
                f"guard: backend {self.backend.name} must have gradients after a batch; got none"
            )
        is_bad = (~get_total_norm(gradients, math.inf).isfinite()).to(loss)
        is_unsolved = torch.full_like(loss, self.rule.is_unsolved())
        sums = self.ranks.sum(torch.stack([loss, is_bad, is_unsolved]))
        median = torch.full_like(loss, math.nan)
        is_bad = ~sums[0].isfinite() | (sums[1] > 0)
        if self.spike:
            ordered_W = self._good_losses_W.sort().values  # NaN is last
            median = ordered_W[WINDOW // 2 - 1 : WINDOW // 2 + 1].mean() + 0 * ordered_W[-1]
            is_bad = is_bad | (sums[0] > self.spike * median)
        return torch.cat([sums, torch.stack([median, is_bad.to(loss)])])

    def _reason(self, verdict: _Verdict) -> str:
        if not math.isfinite(verdict.loss):
            return f"its loss is {verdict.loss}"
        if verdict.bad_ranks:
            unsolved = verdict.unsolved_ranks
            reason = f": {self.rule.label} could not solve for it on {unsolved:.0f}"
            return (
                f"its gradient is not finite on {verdict.bad_ranks:.0f} of"
                f" {counted(self.ranks.size, 'worker')}{reason if unsolved else ''}"
            )
        return (
            f"its loss of {verdict.loss:.4g} is more than {self.spike:g} times the median of"
            f" {verdict.median:.4g}"
        )


def _on_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy in the host's memory, and the event after which it is complete."""
    if not values.is_cuda:
        return values, None
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    is_copied = torch.cuda.Event()
    is_copied.record()
    return copy, is_copied
