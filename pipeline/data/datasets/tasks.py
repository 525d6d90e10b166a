"""Continual-learning tasks of one data set: its pixels in another order, or some of its classes.

A recipe names a task without a data set: `Phase(name="task-1", data=spec(Permuted, task=1))`. The
run passes the recipe's own data set as the argument `data`.
"""

# B batch, C channels, H W pixels, K classes

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, Self

import numpy as np
import torch

from pipeline.core.errors import require_data
from pipeline.core.random import bits
from pipeline.data.base import Batch, Data, Loader, with_levels, with_page_checks

_PIXELS = 80  # the number of the draw that orders the pixels


class _Task:
    """A data set derived from another; `_change` maps each batch of the other.

    `_change` computes no values of `Batch.x`, which may be levels.
    """

    data: Data
    _change: Callable[[Batch], Batch]

    def check(self) -> None:
        self.data.check()

    def with_page_checks(self, one_in: int) -> Self:
        return self._with_data(with_page_checks(self.data, one_in))

    def with_levels(self) -> Self:
        return self._with_data(with_levels(self.data))

    def train(self, **sizes: Any) -> Loader:
        return MappedLoader(self.data.train(**sizes), self._change)

    def val(self, **sizes: Any) -> Loader:
        return MappedLoader(self.data.val(**sizes), self._change)

    def _with_data(self, data: Data) -> Self:
        task = copy.copy(self)
        task.data = data
        return task


class Permuted(_Task):
    """`data` with its pixels in the task's order. Every sample and channel has the same order.

        x'[..., p] = x[..., order(seed, task)[p]],      p = 0..H W - 1

    Images are augmented before they are permuted.

    Args:
        task: the number of the task, from 0.
        first: "permuted" permutes task 0 like the others (as in the code of HLOP and GPM);
            "plain" leaves the images of task 0 unchanged.
        seed: selects the permutations. It is part of the data, unlike a run's seed.

    Raises:
        DataError: the task or the seed is below 0, or `first` is unknown.
    Source:
        Goodfellow et al. 2014 (arXiv 1312.6211) for permuted MNIST.
    """

    def __init__(
        self,
        data: Data,
        *,
        task: int,
        seed: int = 0,
        first: Literal["permuted", "plain"] = "permuted",
    ) -> None:
        require_data(
            min(task, seed) >= 0 and first in ("permuted", "plain"),
            "Permuted: task and seed must be 0 or more, first 'permuted' or 'plain'; "
            f"got task={task}, seed={seed}, first={first!r}",
        )
        self.data, self.classes, self.shape = data, data.classes, data.shape
        pixels = np.arange(data.shape[-2] * data.shape[-1])
        is_plain = task == 0 and first == "plain"
        self.order = (
            pixels if is_plain else np.argsort(bits(seed, task, pixels, _PIXELS), kind="stable")
        )

    def fingerprint(self) -> str:
        parts = ("permuted-1", self.data.fingerprint(), self.order.tolist())
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def with_classes(self, classes: tuple[int, ...]) -> Self:
        return self._with_data(_with_classes("Permuted", self.data, classes))

    def _change(self, batch: Batch) -> Batch:
        x_BP = batch.x.flatten(-2)[..., torch.from_numpy(self.order)]
        return replace(batch, x=x_BP.view_as(batch.x))


class SplitClasses(_Task):
    """The samples of `classes_per_task` classes of `data`.

    Samples of other classes are not in the reading order. Batches are therefore full, and ranks,
    epochs and resumption work as with a whole set. Classes beyond the last full group are in no
    task.

    Args:
        task: the number of the task, from 0. Task k has the k-th group of classes in `order`.
        labels: "task" counts the task's classes from 0, for a separate head per task; "data" keeps
            the labels of the data, for a shared head.
        order: all classes of the data; None: 0, 1, 2, ...

    Raises:
        DataError: there is no such task, `labels` is unknown, `order` is no permutation of the
            classes, or the data cannot be restricted to classes.
    """

    def __init__(
        self,
        data: Data,
        *,
        task: int,
        classes_per_task: int = 2,
        labels: Literal["task", "data"] = "task",
        order: tuple[int, ...] | None = None,
    ) -> None:
        all_classes = tuple(range(data.classes)) if order is None else tuple(order)
        tasks = data.classes // classes_per_task if classes_per_task >= 1 else 0
        require_data(
            sorted(all_classes) == list(range(data.classes)) and labels in ("task", "data"),
            f"SplitClasses: order must hold each of 0..{data.classes - 1} once, and labels must be"
            f" 'task' or 'data'; got order={all_classes}, labels={labels!r}",
        )
        require_data(
            0 <= task < tasks,
            f"SplitClasses: task must be 0 or more, and below the {tasks} tasks that {data.classes}"
            f" classes make with {classes_per_task} per task; got {task}",
        )
        self.labels = labels
        self.task_classes = all_classes[task * classes_per_task : (task + 1) * classes_per_task]
        self.data = _with_classes("SplitClasses", data, self.task_classes)
        self.classes = classes_per_task if labels == "task" else data.classes
        self.shape = data.shape

    def fingerprint(self) -> str:
        parts = ("split-1", self.data.fingerprint(), self.task_classes, self.labels)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _change(self, batch: Batch) -> Batch:
        if self.labels == "data":
            return batch
        task_label_K = torch.full((self.data.classes,), -1)
        task_label_K[list(self.task_classes)] = torch.arange(len(self.task_classes))
        return replace(batch, target=task_label_K[batch.target])


class MappedLoader:
    """A loader that applies `change` to each batch."""

    def __init__(self, loader: Loader, change: Callable[[Batch], Batch]) -> None:
        self.samples, self.steps_per_epoch = loader.samples, loader.steps_per_epoch
        self._loader, self._change = loader, change

    @contextmanager
    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Iterator[Batch]]:
        with self._loader.epoch(epoch, start=start) as batches:
            yield map(self._change, batches)

    def close(self) -> None:
        self._loader.close()


def _with_classes(error_prefix: str, data: Any, classes: tuple[int, ...]) -> Data:
    require_data(
        hasattr(data, "with_classes"),
        f"{error_prefix}: data must have a method with_classes, as Beton and Synthetic have; got"
        f" {type(data).__name__}",
    )
    return data.with_classes(classes)
