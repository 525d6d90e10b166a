"""What a Dataset of torch adds to the contract of data sets (test_contract.py): random transforms,
reading processes, and everything about it that is refused.
"""

import errno
import os
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from pipeline.core.errors import DataError, LoaderError
from pipeline.core.random import ITEM, counter_hash
from pipeline.data.base import Batch
from pipeline.data.datasets.tasks import SplitClasses
from pipeline.data.datasets.torch_dataset import TorchData, from_dataset
from pipeline.recipe.recipe import Recipe, Spec, spec
from pipeline.train import worker
from pipeline.train.job import Job, RankInfo
from tests.helpers.lab import BATCH, Lab
from tests.helpers.loaders import by_index, read, same
from tests.helpers.processes import run_ranks
from tests.helpers.small import make_run, recipes_of, same_weights, small_recipe, steps_of

SIZES: dict[str, Any] = {"seed": 5, "batch_size": 12, "micro_batch": 6}


class Noisy(Dataset[Any]):
    """Items of noise from each of the global generators, told apart by whole numbers."""

    def __init__(self, samples: int = 61, *, names: int = 3, steps: int = 0) -> None:
        self.samples, self.classes = samples, [*"abcdefghij"[:names]]
        self.targets = [i % names for i in range(samples)]
        self.shape = (steps, 2, 4, 4) if steps else (1, 4, 4)
        self.order = torch.randperm(samples)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        x = torch.rand(self.shape) + np.random.rand() + 2 * random.random()  # noqa: NPY002
        # A sum in torch may depend on the number of its threads.
        return x + 10 * self.order[index] * torch.get_num_threads(), self.targets[index]


def data_of(train: Spec | None = None, val: Any = None, **options: Any) -> TorchData:
    train = spec(Noisy) if train is None else train
    return from_dataset(train=train, val=spec(Noisy, samples=13) if val is None else val, **options)


def test_an_item_draws_from_generators_of_its_seed_epoch_and_index() -> None:
    [batch, *_] = read(data_of().train(**SIZES), 3)
    torch_order = torch.randperm(61, generator=torch.Generator().manual_seed(0))
    for x, index in zip(batch.x, batch.index.tolist(), strict=True):
        number = counter_hash(5, 3, index, ITEM)
        of_numpy = np.random.RandomState((number >> 32, number & 0xFFFFFFFF))
        expected = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(number))
        expected = expected + of_numpy.rand() + 2 * random.Random(number).random()
        assert torch.equal(x, expected + 10 * torch_order[index])


def generators() -> list[Any]:
    of_numpy = np.random.get_state()[1].tolist()  # noqa: NPY002
    return [torch.get_rng_state().tolist(), of_numpy, random.getstate()]


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("threads", [2, 3])
def test_processes_read_the_same_bits_and_leave_no_trace(threads: int) -> None:
    before, data = generators(), data_of()
    sizes = SIZES | {"micro_batch": 3, "world": 2, "rank": 1}
    alone, several = (data.train(**sizes, threads=each) for each in (1, threads))
    assert same(read(several, 2, start=24), read(alone, 2)[4:])
    evaluated = [data.val(micro_batch=4, threads=each) for each in (1, threads)]
    assert same(*map(read, evaluated))
    assert generators() == before and torch.get_num_threads() == 2
    in_thread: list[list[Batch]] = []  # Ray's workers train in one
    thread = Thread(target=lambda: in_thread.append(read(several, 2)))
    thread.start()
    thread.join()
    assert same(in_thread[0], read(alone, 2))


def test_each_epoch_draws_anew_and_each_evaluation_the_same() -> None:
    data = data_of()
    first, later = (by_index(read(data.train(**SIZES), epoch)) for epoch in (2, 3))
    assert not any(torch.equal(first[i], later[i]) for i in first.keys() & later.keys())
    assert same(*(read(data.val(micro_batch=4), epoch) for epoch in (0, 7)))


def test_a_held_out_part_is_of_the_training_set() -> None:
    data = data_of(held_out=0.2)
    [held] = read(data.val(micro_batch=99))
    trained = by_index(read(data.train(**SIZES | {"batch_size": 49, "micro_batch": 49})))
    assert sorted([*held.index.tolist(), *trained]) == list(range(61)) and len(held.index) == 12


def test_recordings_as_arrays_of_numpy() -> None:
    class Arrays(Noisy):
        def __getitem__(self, index: int) -> tuple[Any, Any]:
            x, target = super().__getitem__(index)
            x = x.numpy()[:, ::-1] if index % 2 else x.numpy()[:, ::-1].copy()
            x.flags.writeable = False  # as a memory map
            return x, np.int64(target)

    data = data_of(spec(Arrays, steps=3))
    assert (data.shape, data.classes) == ((3, 2, 4, 4), 3)
    tensors = data_of(spec(Noisy, steps=3))
    ours, theirs = (read(each.train(**SIZES))[0] for each in (data, tensors))
    assert torch.equal(ours.x, theirs.x.flip(2)) and torch.equal(ours.target, theirs.target)


def test_a_task_of_some_classes_needs_the_classes_of_all_items() -> None:
    task = SplitClasses(data_of(spec(Noisy, names=4), spec(Noisy, names=4)), task=1)
    batches = read(task.train(**SIZES))
    assert len(batches) == 4 and {i % 4 for i in by_index(batches)} == {2, 3}
    assert torch.equal(batches[0].target, batches[0].index % 4 - 2)
    assert len(task.fingerprint()) == 64
    pairs = spec(as_pairs, samples=4)
    with pytest.raises(DataError, match=r"train must have `targets`, .* 4 items; got 0"):
        SplitClasses(data_of(pairs, pairs, classes=4), task=1).train(**SIZES)
    other = spec(Changed, change=lambda x: (x, 0))
    wrong = SplitClasses(data_of(other, other), task=1, classes_per_task=1)
    with pytest.raises(DataError, match=r"class of each item in `targets`; got another among"):
        read(wrong.train(**SIZES))


def test_nothing_is_built_before_it_is_needed(tmp_path: Path) -> None:
    missing = spec(in_file, file=str(tmp_path / "none"))
    data = data_of(missing, missing, classes=10, shape=(1, 8, 8))
    assert (data.classes, data.shape) == (10, (1, 8, 8))
    for act in (data.fingerprint, data.check, lambda: data.train(**SIZES)):
        with pytest.raises(DataError) as refused:
            act()
        assert "\n" not in str(refused.value)
        assert "train: in_file cannot be built: FileNotFoundError: [Errno 2]" in str(refused.value)


def in_file(file: Path) -> Any:
    file = Path(file)
    return TensorDataset(torch.load(file), torch.zeros(4, dtype=torch.int64))


def as_pairs(samples: int) -> Any:
    return TensorDataset(torch.rand(samples, 1, 4, 4), torch.arange(samples))


def test_the_study_key_covers_the_specs_but_no_path() -> None:
    def key(**words: Any) -> str:
        keywords = {"train": spec(in_file, file="a"), "val": spec(as_pairs, samples=4), **words}
        recipe = small_recipe(data=spec(from_dataset, classes=10, **keywords))
        assert Recipe.from_json(recipe.to_json(), trust=["tests"]) == recipe
        return recipe.study_key({})

    assert key() == key(train=spec(in_file, file="b")) != key(val=spec(as_pairs, samples=5))


def test_tiny_recordings_have_fewer_steps() -> None:
    train, val = (spec(Noisy, samples=samples, steps=3) for samples in (61, 13))
    recipe = small_recipe(data=spec(from_dataset, train=train, val=val))
    tiny = recipe.tiny().data.build()
    assert tiny.shape == (2, 2, 4, 4)
    with pytest.raises(ValueError, match=r"the T of its recordings, must be time_steps=4; got 3"):
        replace(recipe, time_steps=4).check_time_steps(recipe.data.build().shape)


def test_the_fingerprint_is_of_the_items() -> None:
    changes: list[Any] = [{}, {"samples": 62}, {"names": 4}, {"steps": 2}]
    assert len({data_of(spec(Noisy, **change)).fingerprint() for change in changes}) == 4
    assert data_of().fingerprint() == data_of(held_out=0.1).fingerprint()


class Changed(Noisy):
    """Items as `change` makes them of x."""

    def __init__(self, change: Callable[[torch.Tensor], Any], **words: Any) -> None:
        super().__init__(**words)
        self.change = change

    def __getitem__(self, index: int) -> Any:
        return self.change(super().__getitem__(index)[0])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(Noisy())

    def __len__(self) -> int:
        return 61


class Unsized(Dataset[Any]):
    """As many that its author has left unfinished."""


def fails(error: Exception) -> Any:
    raise error


def changed(change: Callable[[torch.Tensor], Any], **words: Any) -> Callable[[], object]:
    return lambda: data_of(spec(Changed, change=change), **words).fingerprint()


own = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: data_of(held_out=1.0), r"held_out must be a share in 0..1, 1 excluded; got 1.0"),
        (lambda: data_of(held_out="0.5"), r"held_out must be a share .* got '0.5'"),
        (lambda: spec(from_dataset, train=Noisy(), val=spec(Noisy)), "train must be Spec; got"),
        (lambda: data_of(val=Noisy()), "val must be the spec of a data set, .* got Noisy$"),
        (lambda: data_of(classes=1.5), r"classes must be a whole number >= 1; got 1\.5"),
        (lambda: data_of(classes=0), "classes must be a whole number >= 1; got 0"),
        (lambda: data_of(spec(Stream)).shape, r"train: Stream must be a map-style .* got Stream"),
        (lambda: data_of(spec(Unsized)).shape, r"train: Unsized must be .* __len__ above 0; got"),
        (lambda: data_of(val=spec(Noisy, samples=0)).check(), r"val: Noisy must be .* above 0"),
        (lambda: data_of(spec(as_pairs, samples=4)).classes, "classes must be given .* as_pairs"),
        (data_of(val=spec(Noisy, names=2)).check, "train and val must have the same classes"),
        (
            changed(lambda x: x),
            r"item 0 of train cannot be read as \(x, class\), .*: ValueError: not enough",
        ),
        (
            changed(lambda x: (x.byte(), 0)),
            r"x must be a tensor of float32 .* got torch.uint8 \[1, 4",
        ),
        (
            changed(lambda x: (Image.new("L", (4, 4)), 0)),
            r"got Image; a transform makes it so, such as torchvision's ToTensor\(\) for PIL",
        ),
        (changed(lambda x: (x.double().numpy(), 0)), r"got float64 \[1, 4, 4\]"),
        (changed(lambda x: (x, 0), shape=(1, 4, 5)), r"float32 \[1, 4, 5\]; got .* \[1, 4, 4\]"),
        (changed(lambda x: (x[0, 0], 0)), r"float32 \[C,H,W\] or .* got torch.float32 \[4\]"),
        (changed(lambda x: (x.sum(), 0)), r"float32 \[C,H,W\] or .* got torch.float32 \[\]"),
        (changed(lambda x: (x, 3)), r"item 0 of train: its class must be in 0\.\.2; got 3"),
        (changed(lambda x: (x, -1)), r"class must be in 0\.\.2; got -1"),
        (changed(lambda x: (x, 1.0)), r"class an int: TypeError: 'float' object cannot"),
        (changed(lambda x: (x, x[0, 0])), "class an int: TypeError: only integer tensors"),
        (
            changed(lambda x: fails(KeyError("a\nb"))),
            r"item 0 of train cannot be read .*: KeyError",
        ),
        (
            changed(lambda x: fails(FileNotFoundError(2, "gone"))),
            "item 0 of train cannot be read .*: FileNotFoundError: ",
        ),
        (changed(lambda x: (x + own.random(), 0)), "item 0 of train must be the same .* differs"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(act: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        act()
    assert "from_dataset: " in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_later_item_is_refused_by_its_index_in_any_process(threads: int) -> None:
    grows = lambda x: (x if x.max() < 300 else x[..., 1:], 0)
    loader = data_of(spec(Changed, change=grows), shape=(1, 4, 4)).train(**SIZES, threads=threads)
    bad = data_of()._dataset("train").order.tolist()
    with pytest.raises(DataError, match=r"item (\d+) of train: x must .* got .* \[1, 4, 3\]") as at:
        read(loader)
    [index] = re.findall(r"item (\d+)", str(at.value))
    assert bad[int(index)] >= 29 and "\n" not in str(at.value)


def test_storage_that_fails_and_a_process_that_dies_may_be_tried_again() -> None:
    away = data_of(spec(Changed, change=lambda x: fails(OSError(errno.EIO, "away"))), shape=(1,))
    with pytest.raises(LoaderError, match=r"item \d+ of train cannot be read .*: OSError: .* away"):
        read(away.train(**SIZES, threads=2))
    dead = data_of(spec(Changed, change=lambda x: os.kill(os.getpid(), signal.SIGKILL)), shape=(1,))
    with pytest.raises(LoaderError, match=r"^from_dataset: reading failed: DataLoader worker"):
        read(dead.train(**SIZES, threads=2))


LAB = """

import random
import numpy as np
import torch
from torch.utils.data import Dataset

class Items(Dataset):
    targets = property(lambda self: [i % 10 for i in range(self.samples)])

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return self.samples

    def __getitem__(self, i):
        x = torch.linspace(0, 1 + i % 10, 64).view(1, 8, 8) + 0.1 * torch.randn(1, 8, 8)
        return (x + np.random.rand()).roll(random.randrange(3), 2), i % 10
"""
DATA = """
    data = spec(
        from_dataset,
        train=spec(Items, samples={samples}),
        val=spec(Items, samples=20),
        classes=10,
        shape=(1, 8, 8),
    )
"""


def train(rank: int, ranks: int, job: Job, package: Path) -> None:
    sys.path.append(str(package))
    worker.run(replace(job, trust=("told_lab",)), RankInfo(rank, ranks, "cpu", rank))


@pytest.mark.full
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("own_store")
def test_a_worker_that_is_killed_takes_its_readers_along_and_no_bit_is_lost(
    tmp_path: Path, driven: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes read for each of its workers; those of the untouched run read themselves."""
    lab = Lab(tmp_path / "lab")
    # another test of this process may have imported another package of this name
    monkeypatch.delitem(sys.modules, "told_lab", raising=False)
    monkeypatch.syspath_prepend(lab.folder)
    with (lab.folder / "told_lab.py").open("a") as file:
        file.write(LAB)
    text = (lab.folder / "told.py").read_text()
    text = re.sub(r"    data = .*\n", DATA.format(samples=10 * BATCH + 5), text)
    imports = "from pipeline.data.datasets.torch_dataset import from_dataset\n"
    text = imports + text.replace("import Told", "import Items, Told")
    (lab.folder / "told.py").write_text(text)
    lab.pace(0.1)
    run = driven(lab, "--workers", "2", "--loader-threads", "2")
    run.at_step(5)
    [worker, _] = [each for each in run.workers() if each.children()]
    readers = worker.children()
    worker.kill()
    _, left = psutil.wait_procs(readers, timeout=4)  # DataLoader's own check takes 5 s
    assert len(readers) == 2 and left == []
    run.finish()
    begun = steps_of(lab.run, "start")
    assert len(begun) == 2 and begun[1] % 10  # in the middle of an epoch
    monkeypatch.syspath_prepend(lab.folder)
    [recipe] = recipes_of(lab.folder / "told.py")
    untouched = make_run(tmp_path / "untouched", recipe)
    (tmp_path / "meeting").mkdir()
    run_ranks(train, 2, tmp_path / "meeting", untouched, lab.folder)
    assert same_weights(lab.run, tmp_path / "untouched", trust=["told_lab"])
