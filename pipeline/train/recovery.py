"""Recovery: how a run survives a fault by itself.

    SkipBatch         the batch leaves no trace, and training takes the next one
    Rollback          the run starts again at its newest checkpoint; if batches are to blame, it
                      skips the batches from there up to the fault
    HalveMicroBatch   memory ran out: the run starts again with half as many samples at a time

`guards/anomaly.py` and `checkpointing.py` raise the first two; `worker.py` catches the others and
starts again. `Decisions` hold for the rest of the run. They are a file in its folder, and a part of
each checkpoint in case the folder is lost. A decision that is younger than the newest checkpoint
is lost with the folder.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from pipeline.core.checks import is_count, require
from pipeline.core.errors import Diverged, UserError
from pipeline.core.run_folder import RunFolder
from pipeline.recipe.recipe import Recipe, read_json, write_json


class Recovery(Exception):
    """A fault that the run survives by itself."""


class SkipBatch(Recovery):
    """The batch must not move the weights. Every rank raises it."""


class StartAgain(Recovery):
    """The attempt ends. The worker starts the next one at the newest checkpoint."""


class Rollback(StartAgain):
    """Every rank raises it. `skips`: the run skips the batches since the checkpoint from now on."""

    def __init__(self, step: int, reason: str, *, skips: bool = True) -> None:
        super().__init__(f"batch {step}: {reason}")
        self.step, self.reason, self.skips = step, reason, skips


class HalveMicroBatch(StartAgain):
    """Raised by a run's only worker. If there are several workers, the worker that runs out of
    memory dies, and all workers are restarted.
    """


@dataclass(frozen=True)
class Decisions:
    """The decisions of recovery so far. No decision is taken back."""

    rollbacks: int = 0
    # batches [first, end) that are skipped after rollbacks
    skipped: tuple[tuple[int, int], ...] = ()
    # the most samples that a worker holds at a time; None: memory has not run out
    micro_batch: int | None = None

    @classmethod
    def read(cls, run: Path) -> Self:
        """Raises: UserError if the file is damaged."""
        file = RunFolder(run).decisions
        if not file.exists():
            return cls()
        value = read_json(file)
        try:
            return cls.from_dict(value)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{file}: must hold rollbacks, skipped and micro_batch; got {value!r}"
            ) from error

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """The decisions that `asdict` has made a dictionary of, and JSON has kept."""
        skipped = tuple((int(first), int(end)) for first, end in value["skipped"])
        rollbacks, limit = value["rollbacks"], value["micro_batch"]
        require(
            is_count(rollbacks, minimum=0) and (limit is None or is_count(limit)),
            "decisions: rollbacks and micro_batch must be whole numbers; got"
            f" {rollbacks!r} and {limit!r}",
        )
        return cls(rollbacks, skipped, limit)

    def write(self, run: Path) -> None:
        write_json(RunFolder(run).decisions, asdict(self))

    @classmethod
    def adopt(cls, run: Path, saved: Mapping[str, Any]) -> None:
        """Write the decisions of a checkpoint that the run's folder lacks into the folder.

        `saved`: the decisions as `asdict` returns them. The folder may be newer than its newest
        checkpoint, and the checkpoint may be newer than an old copy of the folder.
        """
        own, other = cls.read(run), cls.from_dict(saved)
        limits = [each.micro_batch for each in (own, other) if each.micro_batch is not None]
        joined = replace(
            max(own, other, key=lambda each: each.rollbacks), micro_batch=min(limits, default=None)
        )
        if joined != own:
            joined.write(run)

    def fit(self, recipe: Recipe) -> Recipe:
        """The recipe with micro-batches that fit in memory."""
        limit = min(filter(None, (self.micro_batch, recipe.micro_batch)), default=None)
        return replace(recipe, micro_batch=limit)

    def after_rollback(self, back: Rollback, recipe: Recipe, *, to: int, epoch: int) -> Self:
        """The decisions after one more rollback, to the checkpoint after `to` batches.

        Raises:
            Diverged: `policy.max_rollbacks` are used up, and batches are to blame.
            UserError: they are used up, and batches are not to blame.
        """
        if self.rollbacks == recipe.policy.max_rollbacks:
            message = (
                f"training: batch {back.step} (epoch {epoch + 1}): {back.reason}; it has gone back"
                f" max_rollbacks={self.rollbacks} times"
            )
            if back.skips:
                raise Diverged(f"{message}; {recipe.remedy}")
            raise UserError(
                f"{message}; a memory, a device or a network is at fault: look with spiketrain"
                " doctor"
            )
        skipped = (*self.skipped, (to, back.step + 1)) if back.skips else self.skipped
        return replace(self, rollbacks=self.rollbacks + 1, skipped=skipped)
