"""Recovery: how a run survives a fault by itself.

    Rollback          the run starts again at its newest checkpoint. If the batches caused the
                      fault, it skips the batches since that checkpoint, the last one included
    HalveMicroBatch   memory ran out: the run starts again with at most half as many samples at a
                      time

`worker.py` catches `StartAgain`, the base of both, and starts the next attempt. `Decisions` apply
to the rest of the run. They are stored in a file of the run's folder and in each checkpoint.
If the folder is lost, only the decisions since the newest checkpoint are lost.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from pipeline.core.checks import is_count, require
from pipeline.core.errors import Diverged, UserError
from pipeline.core.run_folder import RunFolder
from pipeline.core.units import counted
from pipeline.recipe.recipe import Recipe, read_json, write_json


class StartAgain(Exception):
    """A fault that the run survives by itself. The attempt ends. The worker starts another attempt
    at the newest checkpoint.
    """


class Rollback(StartAgain):
    """Every rank raises this error. `step`: the number of the last batch. `skips`: from now on the
    run skips the batches since the checkpoint.
    """

    def __init__(self, step: int, reason: str, *, skips: bool = True) -> None:
        super().__init__(f"batch {step}: {reason}")
        self.step, self.reason, self.skips = step, reason, skips


class HalveMicroBatch(StartAgain):
    """Raised by a run's only worker. If there are several workers, the worker that runs out of
    memory dies, and all workers are restarted.
    """


@dataclass(frozen=True)
class Decisions:
    """The decisions of recovery so far. No decision is revoked."""

    rollbacks: int = 0
    # batches [first, end) that are skipped after rollbacks
    skipped: tuple[tuple[int, int], ...] = ()
    # limit of the samples that a worker holds at a time; None: memory has not run out
    micro_batch: int | None = None

    @classmethod
    def read(cls, run: Path) -> Self:
        """Raises: ValueError if the file is damaged."""
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
        """Restore decisions from `asdict(decisions)`, which may have passed through JSON.

        Raises: KeyError, TypeError or ValueError if `value` has another form.
        """
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
        """Add the decisions of a checkpoint, `saved`, to the decisions in the run's folder.

        The folder lacks them if it was lost, or if it is an old copy.
        """
        in_folder, in_checkpoint = cls.read(run), cls.from_dict(saved)
        limits = filter(None, (in_folder.micro_batch, in_checkpoint.micro_batch))
        merged = replace(
            max(in_folder, in_checkpoint, key=lambda each: each.rollbacks),
            micro_batch=min(limits, default=None),
        )
        if merged != in_folder:
            merged.write(run)

    def fit(self, recipe: Recipe) -> Recipe:
        """The recipe with its `micro_batch` reduced to the limit of these decisions."""
        limits = filter(None, (self.micro_batch, recipe.micro_batch))
        return replace(recipe, micro_batch=min(limits, default=None))

    def after_rollback(
        self, rollback: Rollback, recipe: Recipe, *, to_step: int, epoch: int
    ) -> Self:
        """The decisions after one more rollback, to the checkpoint of `to_step`.

        Raises:
            Diverged: the run already had `policy.max_rollbacks` rollbacks, and batches caused this
                one.
            UserError: the same, but batches did not cause it.
        """
        if self.rollbacks >= recipe.policy.max_rollbacks:
            message = (
                f"training: batch {rollback.step} (epoch {epoch + 1}): {rollback.reason}; all"
                f" rollbacks of max_rollbacks={recipe.policy.max_rollbacks} are used"
            )
            if rollback.skips:
                raise Diverged(f"{message}; {recipe.remedy}")
            raise UserError(
                f"{message}; memory, a device or a network is faulty: check with spiketrain doctor"
            )
        skipped = ((to_step, rollback.step + 1),) if rollback.skips else ()
        return replace(self, rollbacks=self.rollbacks + 1, skipped=self.skipped + skipped)

    def after_out_of_memory(
        self, recipe: Recipe, *, samples: int, ranks: int, check: Callable[[Recipe], Recipe]
    ) -> Self:
        """The decisions after memory has run out with `samples` samples at a time.

        The new micro-batch is the largest that the recipe accepts, up to half of `samples`. The
        global batch stays the same. Results differ only by the order of sums, unless a module
        depends on the micro-batch, as batch norm does.

        `check` returns the recipe that will train, or raises ValueError.

        Raises:
            ValueError: the recipe accepts no smaller micro-batch.
        """
        refusal = None
        for fewer in range(samples // 2, 0, -1):
            decisions = replace(self, micro_batch=fewer)
            try:
                checked = check(decisions.fit(recipe))
            except ValueError as error:
                refusal = refusal or error  # keeps the error of the largest micro-batch
                continue
            if checked.split(ranks).micro_batch == fewer:  # `fewer` divides the batch
                return decisions
        why = f", and the recipe does not accept fewer: {refusal}" if refusal else ""
        raise ValueError(
            f"training: the device's memory runs out with {counted(samples, 'sample')} at a"
            f" time{why}; take a smaller network, or a device with more memory"
        ) from refusal
