"""The tasks of a run: their data, and the accuracy on each task after each task. A recipe without
phases is one task.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pipeline.core.checks import require
from pipeline.data.base import Data, Loader, with_levels, with_page_checks
from pipeline.models.transforms import MultiHead, select_head
from pipeline.recipe.json import dotted, is_trusted
from pipeline.recipe.recipe import TRUSTED, Recipe, Split
from pipeline.train.part_checks import check_data_members, check_first_batch, check_loader


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str
    data: Data
    epochs: int
    head: int | None = None  # the head of the network for this task; None: the network has one head

    def choose_head(self, network: nn.Module) -> None:
        """Select the task's head, if the network has several heads.

        Raises:
            ValueError: the head does not exist, or the task names none and the network has several.
        """
        if self.head is not None:
            select_head(network, self.head)
        elif any(isinstance(module, MultiHead) for module in network.modules()):
            raise ValueError(
                "recipe: the network has several heads, so each phase must name its head; got"
                f" head=None for {self.name}"
            )


def tasks_of(
    recipe: Recipe, *, one_in: int = 0, device: torch.device = torch.device("cpu")
) -> tuple[Task, ...]:
    """The tasks in training order. Opens no file.

    Args:
        one_in: see `data.base.with_page_checks`.
        device: of the network. Batches for a GPU have levels where they can
            (`data.base.with_levels`).

    Raises:
        ValueError: a task's data does not implement `pipeline.data.base.Data`.
    """
    data = with_page_checks(build_data(recipe), one_in)
    leave_lookup = with_levels if device.type == "cuda" else lambda data: data
    if not recipe.phases:
        return (Task(name=recipe.name, data=leave_lookup(data), epochs=recipe.epochs),)
    return tuple(
        Task(
            name=phase.name,
            data=leave_lookup(check_data_members(phase.data.build(data), phase.data)),
            epochs=phase.epochs or recipe.epochs,
            head=phase.head,
        )
        for phase in recipe.phases
    )


def build_data(recipe: Recipe) -> Data:
    """The recipe's data. Opens no file.

    Raises:
        ValueError: the data does not implement `pipeline.data.base.Data`.
    """
    return check_data_members(recipe.data.build(), recipe.data)


def fingerprint_of(recipe: Recipe) -> str:
    """The fingerprint of the recipe's data.

    Raises:
        ValueError: the data cannot be read, or the fingerprint is not text.
    """
    data = build_data(recipe)
    fingerprint = data.fingerprint()
    require(
        isinstance(fingerprint, str) and bool(fingerprint),
        f"data: {type(data).__name__}.fingerprint must return a hash as text; got {fingerprint!r}",
    )
    return fingerprint


def check_data(data: Data, *, fingerprint: str, every_page: bool) -> None:
    """Compare the fingerprint of a data set with that of the launch.

    `every_page`: also compare every page with its checksum.

    Raises:
        ValueError: the fingerprint differs, or a page is damaged.
    """
    current = data.fingerprint()
    require(
        current == fingerprint,
        f"data: the content must be as at the launch, {fingerprint[:12]}; got {current[:12]}:"
        " restore the file that the recipe names",
    )
    if every_page:
        data.check()


class Loaders:
    """Opens the training and evaluation set of each task for one rank. The caller closes them.

    `lengths` has the number of samples and the global batches per epoch of each training set.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        recipe: Recipe,
        split: Split,
        *,
        rank: int = 0,
        threads: int = 1,
    ) -> None:
        self.tasks = tuple(tasks)
        # The batches of a user's own data sets are checked. Tests check those of this package.
        parts = (recipe.data, *(phase.data for phase in recipe.phases))
        self._checks_batches = rank == 0 and not all(
            is_trusted(dotted(part.target), TRUSTED) for part in parts
        )
        self._loader_arguments = {
            "rank": rank,
            "world": split.workers,
            "micro_batch": split.micro_batch,
            "threads": threads,
        }
        self._train_arguments = {"seed": recipe.seed, "batch_size": recipe.batch_size}
        self.lengths = tuple(map(self._check_sets, range(len(self.tasks))))

    def train(self, task: int) -> Loader:
        return self.tasks[task].data.train(**self._train_arguments, **self._loader_arguments)

    def val(self, task: int) -> Loader:
        return self.tasks[task].data.val(**self._loader_arguments)

    def _check_sets(self, task: int) -> tuple[int, int]:
        """Open both sets once, to find errors before training. Returns the entry of `lengths`."""
        data = self.tasks[task].data
        with (
            closing(check_loader(self.train(task), data, "train")) as train_set,
            closing(check_loader(self.val(task), data, "val")) as val_set,
        ):
            if self._checks_batches:
                check_first_batch(train_set, data, "train")
                check_first_batch(val_set, data, "val")
            return train_set.samples, train_set.steps_per_epoch


@dataclass
class TaskResults:
    """The results after each finished task."""

    # the accuracy matrix: each row has the top-1 on this task and the earlier ones, in their order
    rows: list[list[float]] = field(default_factory=list)
    rule_metrics: list[dict[str, float]] = field(default_factory=list)

    def backward_transfer(self, row: Sequence[float]) -> float | None:
        """BWT (backward transfer): the mean change of the top-1 on an earlier task since the end of
        its training. Negative values mean forgetting. `row`: the current top-1 on the k tasks so
        far.

            1/(k-1) sum_{i<k} (row[i] - rows[i][i]),      None for k = 1

        Source: Lopez-Paz & Ranzato 2017 (arXiv 1706.08840), eq. 3.
        """
        changes = [now - then[-1] for now, then in zip(row[:-1], self.rows, strict=False)]
        return sum(changes) / len(changes) if changes else None

    def metrics(self, row: Sequence[float], tasks: Sequence[Task]) -> dict[str, float]:
        """The metrics of an evaluation on the tasks so far, for the journal."""
        values = {f"top1_{task.name}": top1 for task, top1 in zip(tasks, row, strict=False)}
        bwt = self.backward_transfer(row)
        return values if bwt is None else {**values, "bwt": bwt}

    def summary(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """Entries of summary.json. "acc" (ACC) is the mean of the last row, in 0..1; "bwt" is in
        -1..1.
        """
        last = self.rows[-1]
        return {
            "accuracy_matrix": self.rows,
            "acc": sum(last) / len(last),
            "bwt": self.backward_transfer(last),
            "phases": [
                {"name": task.name, "head": task.head, "top1": row[-1], "rule_metrics": metrics}
                for task, row, metrics in zip(tasks, self.rows, self.rule_metrics, strict=True)
            ],
        }
