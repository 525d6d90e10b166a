"""A map-style Dataset of torch as the data of a recipe.

    data=spec(from_dataset, train=spec(Digits, part="train"), val=spec(Digits, part="val"))

An item is (x, class): x is float32 [C,H,W], or [T,C,H,W] for a recording, as a tensor or an array
of numpy. All items have the same shape. The order of items, the split over ranks and resumption are
as for data in files. torch's DataLoader reads the items.
"""

# B batch

import errno
import hashlib
import operator
import random
import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, multiprocessing
from torch.utils.data import DataLoader, IterableDataset

from pipeline.core.checks import is_count
from pipeline.core.errors import require_data
from pipeline.core.random import ITEM, counter_hash
from pipeline.data.base import Batch, DataError, LoaderError
from pipeline.data.order import OrderedData, Part, TrainOrder, ValOrder
from pipeline.recipe.spec import Spec

HASHED = 64  # items of each set that the fingerprint covers, evenly spread


def from_dataset(
    *,
    train: Spec,
    val: Spec,
    classes: int | None = None,
    shape: tuple[int, ...] | None = None,
    held_out: float = 0.0,
) -> "TorchData":
    """The data of a recipe whose items come from two data sets of torch.

    The data sets are built when they are first needed, not here. With `classes` and `shape` that is
    when the data is checked or read. Without them the training set is built as soon as they are
    asked for.

    While an item is read, the global generators of torch (CPU), numpy and random have a state that
    depends on (seed, epoch, index of the item) only, and torch uses one thread. Random transforms
    that draw from these generators therefore give the same bits on any number of ranks and
    processes, and after a resume. An evaluation draws the same numbers each time. The data sets are
    built with a fixed state of the generators.

    With `threads` (`--loader-threads`) above 1, each rank starts that many processes for an epoch
    or an evaluation. With 1, the process of the rank reads its items itself.

    Args:
        train, val: the specs of the training and the evaluation set.
        classes: the number of classes; None: the length of the training set's `classes`, a list of
            names.
        shape: of an item's x; None: that of the first training item.
        held_out: the share of the training set that replaces the evaluation set (see Beton). These
            items keep the transforms of the training set.

    Raises:
        DataError: `train` or `val` is no spec, `classes` no whole number from 1 on, or `held_out`
            no share below 1.
    """
    return TorchData(train, val, classes, shape, held_out)


class TorchData(OrderedData):
    """See `from_dataset`. Each method raises DataError if a data set cannot be built, is not
    map-style or has no items, or if one of its items cannot be read or has another form.
    """

    _error_prefix = "from_dataset"
    repeats = 1

    def __init__(
        self,
        train: Spec,
        val: Spec,
        classes: int | None,
        shape: tuple[int, ...] | None,
        held_out: float,
    ) -> None:
        self._hold_out(held_out)
        self._specs: dict[Part, Spec] = {"train": train, "val": val}
        for part, given in self._specs.items():
            require_data(
                isinstance(given, Spec),
                f"from_dataset: {part} must be the spec of a data set, spec(BUILDER, ...); got"
                f" {type(given).__name__}",
            )
        require_data(
            classes is None or is_count(classes),
            f"from_dataset: classes must be a whole number >= 1; got {classes!r}",
        )
        self._classes, self._shape = classes, shape
        self._built: dict[Part, Any] = {}  # copies (`with_classes`) share it

    @property
    def classes(self) -> int:
        """Raises: DataError if it was not given, and the training set has no list of classes."""
        if self._classes is None:
            names: Any = getattr(self._dataset("train"), "classes", None)
            require_data(
                isinstance(names, Sequence),
                "from_dataset: classes must be given unless the training set has a list `classes`;"
                f" {self._specs['train'].target.__name__} has none",
            )
            self._classes = len(names)
        return self._classes

    @property
    def shape(self) -> tuple[int, ...]:
        if self._shape is None:
            x_B, _, _ = self.read("train", np.zeros(1, np.int64))
            self._shape = tuple(x_B.shape[1:])
        return self._shape

    def fingerprint(self) -> str:
        """A hash of the numbers of items, and of up to 64 items of each set.

        Raises: DataError if one of these items differs when it is read again.
        """
        content = hashlib.sha256(b"torch-dataset-1")
        for part in ("train", "val"):
            samples = len(self._dataset(part))
            content.update(f" {part} {samples}".encode())
            for index in np.unique(np.arange(HASHED) * samples // HASHED):
                value, again = (
                    [each.numpy().tobytes() for each in self.read(part, np.array([index]))]
                    for _ in range(2)
                )
                require_data(
                    value == again,
                    f"from_dataset: item {index} of {part} must be the same whenever the generators"
                    " of torch, numpy and random have the same state; it differs: a transform must"
                    " draw from them, not from a generator of its own",
                )
                content.update(b"".join(value))
        return content.hexdigest()

    def check(self) -> None:
        """Compare the lists of classes, where both sets have one. There are no checksums.

        Training checks each item that it reads.
        """
        names, val_names = (
            getattr(self._dataset(part), "classes", None) for part in ("train", "val")
        )
        require_data(
            names is None or val_names is None or list(names) == list(val_names),
            "from_dataset: train and val must have the same classes, in the same order",
        )

    def read(
        self, part: Part, ids_B: NDArray[np.int64], *, seed: int = 0, epoch: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,...], target [B] and index [B] of these items."""
        with _restored_generators():
            items = [self._item(part, index, seed=seed, epoch=epoch) for index in ids_B.tolist()]
        x, targets = zip(*items, strict=True)
        return torch.stack(x), torch.tensor(targets), torch.from_numpy(ids_B.copy())

    def _item(self, part: Part, index: int, *, seed: int, epoch: int) -> tuple[Tensor, int]:
        subject = f"from_dataset: item {index} of {part}"
        dataset = self._dataset(part)
        _set_generators(counter_hash(seed, epoch, index, ITEM))
        try:
            x, target = dataset[index]
            label = operator.index(target)
        except Exception as error:
            raise _failure(
                f"{subject} cannot be read as (x, class), class an int", error
            ) from error
        if isinstance(x, np.ndarray) and x.dtype == np.float32:
            x = torch.from_numpy(np.require(x, requirements=("C", "W")))
        got = f"{x.dtype} {[*x.shape]}" if hasattr(x, "dtype") else type(x).__name__
        require_data(
            isinstance(x, Tensor)
            and x.dtype == torch.float32
            and (x.dim() in (3, 4) if self._shape is None else [*x.shape] == [*self._shape]),
            f"{subject}: x must be a tensor of float32"
            f" {[*self._shape] if self._shape else '[C,H,W] or [T,C,H,W]'}; got {got}; a transform"
            " makes it so, such as torchvision's ToTensor() for PIL images, x.float() / 255 for"
            " levels",
        )
        require_data(
            0 <= label < self.classes,
            f"{subject}: its class must be in 0..{self.classes - 1}; got {label}",
        )
        return cast(Tensor, x).detach(), label  # another process cannot send a graph

    def _dataset(self, part: Part) -> Any:
        """Raises: DataError if it cannot be built, is not map-style or has no items."""
        if part not in self._built:
            subject = f"from_dataset: {part}: {self._specs[part].target.__name__}"
            try:
                with _restored_generators():
                    _set_generators(0)  # the same random split in each process
                    dataset: Any = self._specs[part].build()
            except Exception as error:
                raise _failure(f"{subject} cannot be built", error) from error
            require_data(
                not isinstance(dataset, IterableDataset)
                and hasattr(dataset, "__getitem__")
                and hasattr(dataset, "__len__")
                and len(dataset) > 0,
                f"{subject} must be a map-style data set, with __getitem__ and a __len__ above 0;"
                f" got {type(dataset).__name__}; the order of samples is an order of its indices",
            )
            self._built[part] = dataset
        return self._built[part]

    def _samples(self, part: Part) -> int:
        return len(self._dataset(part))

    def _labels(self, part: Part) -> NDArray[np.int64]:
        targets, samples = getattr(self._dataset(part), "targets", ()), self._samples(part)
        require_data(
            len(targets) == samples,
            f"from_dataset: for a task of some classes, {part} must have `targets`, the class of"
            f" each of its {samples} items; got {len(targets)}",
        )
        return np.asarray(targets)

    def _loader(
        self, part: Part, order: TrainOrder | ValOrder, *, seed: int, threads: int
    ) -> "TorchLoader":
        _ = self.shape  # the first item is read, if it must be, before processes start
        return TorchLoader(self, self.stored_part(part), order, seed=seed, threads=threads)


class TorchLoader:
    """The batches of one rank, read by a DataLoader.

    Args:
        seed: selects the random numbers of transforms, with the epoch if `order` is a TrainOrder.
        threads: the number of reading processes; 1: this process reads.
    """

    def __init__(
        self,
        data: TorchData,
        stored: Part,
        order: TrainOrder | ValOrder,
        *,
        seed: int,
        threads: int,
    ) -> None:
        self.samples, self.steps_per_epoch = order.samples, order.steps
        self._stored: Part = stored
        self._data, self._order, self._seed = data, order, seed
        self._processes = threads if threads > 1 else 0

    @contextmanager
    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Iterator[Batch]]:
        ids, size = self._order.epoch(epoch, start=start), self._order.micro_batch
        drawing_epoch = epoch if isinstance(self._order, TrainOrder) else 0
        # The items of DataLoader's data set are the ids of a batch, and its collate_fn reads them.
        loader = DataLoader[Any](
            cast(Any, [ids[i : i + size] for i in range(0, len(ids), size)]),
            batch_size=None,
            collate_fn=partial(self._read_or_error, epoch=drawing_epoch),
            num_workers=self._processes,
            pin_memory=torch.cuda.is_initialized(),  # as in ffcv/reader.py
            generator=torch.Generator(),  # DataLoader would advance the global one (torch 2.13)
            multiprocessing_context="fork" if self._processes else None,
            worker_init_fn=_start_process,
        )
        with closing(_batches(loader)) as batches:  # then the iterator ends its processes
            yield batches

    def close(self) -> None:
        """Do nothing: an epoch ends its processes itself."""

    def _read_or_error(
        self, ids_B: Any, *, epoch: int
    ) -> tuple[Tensor, Tensor, Tensor] | Exception:
        """A batch, or the error as a value: to the message of one that is raised, DataLoader adds
        the traceback of its process.
        """
        used_classes = self._data.used_classes
        try:
            batch = self._data.read(self._stored, ids_B, seed=self._seed, epoch=epoch)
            require_data(
                used_classes is None or set(batch[1].tolist()) <= set(used_classes),
                f"from_dataset: {self._stored} must have the class of each item in `targets`;"
                f" got another among the items {ids_B.tolist()}",
            )
        except (DataError, LoaderError) as error:
            return error
        return batch


def _batches(loader: DataLoader[Any]) -> Generator[Batch]:
    """Raises:
    DataError: an item cannot be read or has another form.
    LoaderError: the storage failed, or a reading process died.
    """
    try:
        for values in loader:
            if isinstance(values, Exception):
                raise values
            yield Batch(*values)
    except LoaderError:
        raise
    except RuntimeError as error:
        raise LoaderError(f"from_dataset: reading failed: {error}".partition("\n")[0]) from error


def _start_process(_: int) -> None:
    """Let a reading process end with its parent, whose locks, connections and GPU it inherits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the parent's handler
    multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # pyright: ignore


@contextmanager
def _restored_generators() -> Iterator[None]:
    """Restore the global generators of torch (CPU), numpy and random, and torch's threads."""
    threads, numpy_state, state = torch.get_num_threads(), np.random.get_state(), random.getstate()
    torch.set_num_threads(1)  # a sum over an item then has the same bits in each process
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        np.random.set_state(numpy_state)
        random.setstate(state)


def _set_generators(number: int) -> None:
    """Set the states of the global generators from a number of 64 bits."""
    torch.default_generator.manual_seed(number)  # not `torch.manual_seed`, which seeds GPUs, too
    np.random.seed((number >> 32, number & 0xFFFFFFFF))
    random.seed(number)


def _failure(text: str, error: Exception) -> DataError | LoaderError:
    """The error in one line: a LoaderError if a retry may help, else a DataError."""
    lasting = (None, errno.ENOENT, errno.EACCES, errno.EPERM)  # of a decoder: None
    may_be_temporary = isinstance(error, OSError) and error.errno not in lasting
    message = f"{text}: {type(error).__name__}: {error}".partition("\n")[0]
    return LoaderError(message) if may_be_temporary else DataError(message)
