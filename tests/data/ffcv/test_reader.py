"""What stock FFCV does not promise: exact repetition, errors that arrive, batches that stay,
threads that end.
"""

import gc
import hashlib
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from pipeline.data.base import DataError, LoaderError
from pipeline.data.datasets.beton import Beton
from pipeline.data.ffcv import format as beton_format
from pipeline.data.ffcv import manifest as manifests
from pipeline.data.ffcv import reader, tbb
from tests.helpers.loaders import by_index, read

SIZES = {"seed": 5, "batch_size": 12, "micro_batch": 12}


@pytest.fixture(scope="module")
def data(photos) -> Beton:
    return Beton(photos, classes=2, size=32)


@pytest.fixture(autouse=True)
def no_thread_stays():
    before = threading.active_count()
    yield
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() <= before


def digests(loader, epoch=1, start=0):
    with loader.epoch(epoch, start=start) as batches:
        return [digest(batch) for batch in batches]


def digest(batch) -> str:
    return hashlib.sha256(
        b"".join(each.numpy().tobytes() for each in (batch.x, batch.target, batch.index))
    ).hexdigest()


def test_batches_are_bit_identical_for_any_number_of_threads(data):
    found = []
    for threads in (4, 2, 1):
        loader = data.train(**SIZES, threads=threads)
        digests(loader, epoch=0)  # fills the buffers with something else
        found.append(digests(loader))
    four, two, one = found
    assert len(set(one)) == 5
    assert one == two == four


def test_batches_are_bit_identical_in_another_process(data):
    code = (
        "import sys, hashlib, torch; torch.set_num_threads(3)\nfrom pipeline.data.datasets.beton"
        " import Beton\nwith Beton(sys.argv[1], classes=2, size=32).train(seed=5, batch_size=12,"
        " micro_batch=12).epoch(1) as batches:\n    for b in batches:\n       "
        " print(hashlib.sha256(b''.join(t.numpy().tobytes() for t in (b.x, b.target,"
        " b.index))).hexdigest())\nprint(torch.get_num_threads())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(data.folder)], capture_output=True, text=True, timeout=100
    )
    # 3: importing FFCV alone would have left torch 1 thread
    assert run.stdout.split() == [*digests(data.train(**SIZES)), "3"], run.stderr


def test_epochs_differ_in_augmentation(data):
    loader = data.train(**SIZES)

    first, second = (by_index(read(loader, epoch)) for epoch in (0, 1))
    both = first.keys() & second.keys()
    assert len(both) > 50 and not any(torch.equal(first[i], second[i]) for i in both)


def test_targets_belong_to_their_samples(data):
    labels = beton_format.samples(data.folder / "train.beton").labels
    for batch in read(data.train(**SIZES)):
        assert batch.target.tolist() == labels[batch.index.numpy()].tolist()


def test_batches_can_be_kept(data):
    with data.train(seed=5, batch_size=2, micro_batch=2).epoch(0) as batches:
        first = next(batches)
        before = digest(first)
        list(batches)
    assert digest(first) == before


def test_a_process_on_the_cpu_of_a_machine_with_a_gpu_pins_no_memory(data, monkeypatch):
    """There torch would open a context on the card."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made, pins = torch.empty, []

    def empty(*size, **how):
        if "pin_memory" in how:  # FFCV's own memory is never pinned
            pins.append(how.pop("pin_memory"))
        return made(*size, **how)

    monkeypatch.setattr(torch, "empty", empty)
    with data.train(**SIZES).epoch(1) as batches:
        next(iter(batches))
        monkeypatch.setattr(
            torch.cuda, "is_initialized", lambda: True
        )  # as in one that computes on the card
        next(iter(batches))
    assert pins == [False, True]


def test_an_early_break_leaves_no_thread(data):
    loader = data.train(seed=5, batch_size=2, micro_batch=2)
    before = threading.active_count()
    for _ in range(5):
        with loader.epoch(0) as batches:
            next(batches)
        assert threading.active_count() == before
    with pytest.raises(ZeroDivisionError), loader.epoch(0):
        raise ZeroDivisionError
    assert threading.active_count() == before


def test_an_early_break_does_not_read_the_rest(data, monkeypatch):
    stock, read = reader._Reading.run_pipeline, []

    def counted(self, number, *rest):
        read.append(number)
        return stock(self, number, *rest)

    monkeypatch.setattr(reader._Reading, "run_pipeline", counted)
    with data.train(seed=5, batch_size=2, micro_batch=2).epoch(0) as batches:
        next(batches)
    assert len(read) <= 7  # of 30: 1 consumed, 3 in the queue, what was under way


def test_close_stops_what_is_open(data):
    loader = data.train(seed=5, batch_size=2, micro_batch=2)
    with loader.epoch(0) as batches:
        next(batches)
        loader.close()
        loader.close()
        with pytest.raises(LoaderError, match="was closed"):
            list(batches)


def test_an_error_in_the_thread_arrives(data, monkeypatch):
    loader = data.train(**SIZES)

    def broken(*_):
        raise OSError("disk on fire")

    monkeypatch.setattr(reader._Reading, "run_pipeline", broken)
    begin = time.monotonic()
    with (
        pytest.raises(LoaderError, match=r"train\.beton failed: OSError: disk on fire"),
        loader.epoch(0) as batches,
    ):
        next(batches)
    assert time.monotonic() - begin < 10  # seconds, on a busy machine


def test_a_hang_arrives_at_the_limit(data, monkeypatch):
    loader, free = data.train(**SIZES, hang_s=0.5), threading.Event()
    monkeypatch.setattr(reader._Reading, "run_pipeline", lambda *_: free.wait(30))
    monkeypatch.setattr(reader, "PATIENCE_S", 0.1)
    begin = time.monotonic()
    with pytest.raises(LoaderError, match=r"no batch for 0\.5 s"), loader.epoch(0) as batches:
        next(batches)
    assert 0.4 < time.monotonic() - begin < 10
    free.set()


def test_a_hang_after_the_first_batch_arrives_within_seconds(data, monkeypatch):
    monkeypatch.setattr(reader, "HANG_S", 0.5)
    monkeypatch.setattr(reader, "PATIENCE_S", 0.1)
    free, original, done = threading.Event(), reader._Reading.run_pipeline, []

    def hang_later(self, *args):
        done.append(None)
        return original(self, *args) if len(done) < 3 else free.wait(30)

    monkeypatch.setattr(reader._Reading, "run_pipeline", hang_later)
    with (
        pytest.raises(LoaderError, match=r"no batch for 0\.5 s"),
        data.train(**SIZES).epoch(0) as batches,
    ):
        assert len(list(batches)) < 3
    free.set()


def test_a_thread_that_dies_is_noticed(data, monkeypatch):
    monkeypatch.setattr(reader._Reading, "run", lambda _: None)
    with pytest.raises(LoaderError, match="thread ended"), data.train(**SIZES).epoch(0) as batches:
        next(batches)


@pytest.fixture
def corrupt(data, tmp_path) -> tuple[Path, int]:
    """A copy of the data, and the sample whose JPEG is broken in it."""
    folder = shutil.copytree(data.folder, tmp_path / "broken")
    found = beton_format.samples(folder / "train.beton")
    victim = next(i for i in range(20, 61) if found.records["mode"][i] == beton_format.JPG)
    with (folder / "train.beton").open("r+b") as file:
        file.seek(int(found.records["data_ptr"][victim]) + 2)
        file.write(bytes(64))
    return folder, victim


@pytest.mark.parametrize("threads", [1, 2])
def test_a_corrupt_jpeg_is_named(corrupt, threads):
    folder, victim = corrupt
    loader = Beton(folder, classes=2, size=32).train(**SIZES, threads=threads)
    with (
        pytest.raises(
            DataError, match=rf"train\.beton: cannot decode the JPEG of samples \[{victim}\]"
        ),
        loader.epoch(0) as batches,
    ):
        list(batches)


@pytest.mark.parametrize("threads", [1, 2])
def test_with_page_checks_it_is_a_damaged_page_unless_it_was_written_so(corrupt, threads):
    folder, victim = corrupt
    path = folder / "train.beton"
    data = Beton(folder, classes=2, size=32).with_page_checks(1 << 30)
    said = (
        r"train\.beton: page 0 \(bytes \d+ to \d+, samples 0 to 60\) differs from its manifest:"
        r" damaged"
    )
    with (
        pytest.raises(DataError, match=said),
        data.train(**SIZES, threads=threads).epoch(0) as batches,
    ):
        list(batches)

    known = manifests.read(path)
    about = {
        "content": known.content,
        "classes": known.classes,
        "labels": beton_format.samples(path).labels.tolist(),
    }
    manifests.describe(path, name=path.name, **about).write(
        path.with_name(path.name + manifests.SUFFIX)
    )
    said = rf"train\.beton: cannot decode the JPEG of samples \[{victim}\]"
    with (
        pytest.raises(DataError, match=said),
        data.train(**SIZES, threads=threads).epoch(0) as batches,
    ):
        list(batches)


def test_torch_keeps_its_threads(data):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        digests(data.train(**SIZES, threads=2))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_too_many_threads_are_refused_and_tbb_demanded(monkeypatch):
    most = reader.numba.config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]
    assert reader.usable_threads(most) == most
    with pytest.raises(DataError, match=f"threads must be at most {most} here .*; got 64"):
        reader.usable_threads(64)
    with pytest.raises(DataError, match="threads must be 1 or more; got 0"):
        reader.usable_threads(0)

    def missing(name):
        raise ImportError("libtbb.so.12: cannot open shared object file")

    monkeypatch.setattr(tbb.importlib, "import_module", missing)
    assert reader.usable_threads(1) == 1
    with pytest.raises(DataError, match=r"needs TBB .*threads=1; got: libtbb"):
        reader.usable_threads(2)


def test_two_loaders_at_once(data):
    train, val = data.train(**SIZES, threads=2), data.val(micro_batch=4, threads=2)
    alone = digests(train)
    with train.epoch(1) as batches:
        seen = [digest(next(batches))]
        assert len(digests(val)) == 4
        seen += [digest(batch) for batch in batches]
    assert seen == alone


def test_memory_is_returned(data):
    loader = data.train(**SIZES)
    for _ in range(3):
        digests(loader)
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is reader._Reading]
