"""What a test does at a step of a training, or lets it die of there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from pipeline.rules.base import LossFn
from pipeline.train.objective import CrossEntropy
from pipeline.train.trainer import Trainer

Act = Callable[[Trainer], object]


def newest(step: int, *, every: int = 3) -> int:
    """The newest checkpoint by then, of one each `every` steps and one at each epoch's end."""
    return max(each for each in range(step + 1) if each % every == 0 or each % 8 == 0)


def before_batch(patch: pytest.MonkeyPatch, act: Act, *, step: int | None = None) -> None:
    """Call `act` before a trainer reads batch `step`, or any batch."""
    act_before("_micro_batches", patch, act, step)


def between_batches(patch: pytest.MonkeyPatch, act: Act, *, step: int | None = None) -> None:
    """Call `act` after `step` batches, or after each, before the trainer looks for requests."""
    act_before("_between_batches", patch, act, step)


def act_before(name: str, patch: pytest.MonkeyPatch, act: Act, step: int | None) -> None:
    """Call `act` before the trainer's method of that name, after `step` batches or always."""
    original = getattr(Trainer, name)

    def acting(self: Trainer, *words: Any, **about: Any) -> Any:
        if step in (None, self.step):
            act(self)
        return original(self, *words, **about)

    patch.setattr(Trainer, name, acting)


def change_losses(patch: pytest.MonkeyPatch, changed: Callable[[int, Tensor], Tensor]) -> None:
    """`changed(step, loss)` stands in the place of the loss of each micro-batch."""
    loss_for, now = CrossEntropy.__call__, [0]

    def call(self: CrossEntropy, target_B: Tensor, teacher_BK: Tensor | None = None) -> LossFn:
        loss_fn = loss_for(self, target_B, teacher_BK)
        return lambda logits_BK: changed(now[0], loss_fn(logits_BK))

    before_batch(patch, lambda trainer: now.__setitem__(0, trainer.step))
    patch.setattr(CrossEntropy, "__call__", call)


class Killed(BaseException):
    """Stands for the death of a process: nothing in the product catches it."""


def die(*args: object, **named: object) -> None:
    """For a patched function: the process dies in it."""
    raise Killed


@contextmanager
def dies(patched: Callable[[pytest.MonkeyPatch], None]) -> Iterator[None]:
    """The training inside dies where `patched` has it die."""
    with pytest.MonkeyPatch.context() as patch:
        patched(patch)
        with pytest.raises(Killed):
            yield


@contextmanager
def dies_at(step: int) -> Iterator[None]:
    """The training inside dies before it reads batch `step`."""
    with dies(lambda patch: before_batch(patch, die, step=step)):
        yield
