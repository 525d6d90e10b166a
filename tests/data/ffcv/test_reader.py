"""What stock FFCV does not promise: exact repetition, errors that arrive, batches that stay,
threads that end.
"""

import gc
import hashlib
import re
import shutil
import subprocess
import sys
import threading
import time
from unittest.mock import Mock

import pytest
import torch

from pipeline.core.saved_loops import numba_config
from pipeline.data.base import DataError, LoaderError
from pipeline.data.datasets.beton import Beton
from pipeline.data.ffcv import manifest as manifests
from pipeline.data.ffcv import numba_threads, reader
from pipeline.data.ffcv.format import JPG, read_tables
from pipeline.data.ffcv.loader import usable_threads

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


def digests(loader, epoch=1):
    with loader.epoch(epoch) as batches:
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
    assert len(set(found[0])) == 5
    assert found[0] == found[1] == found[2]


IN_ANOTHER_PROCESS = """
import sys, torch
torch.set_num_threads(3)
from pipeline.data.datasets.beton import Beton
from tests.data.ffcv.test_reader import SIZES, digests
print(*digests(Beton(sys.argv[1], classes=2, size=32).train(**SIZES, threads=2)))
print(torch.get_num_threads())
"""


@pytest.mark.full
def test_batches_are_bit_identical_in_another_process_whose_torch_keeps_its_threads(data):
    run = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(data.folder)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    # 3: FFCV would have left torch 1 thread when it is imported, and 2 for the loader
    assert run.stdout.split() == [*digests(data.train(**SIZES)), "3"], run.stderr


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


def test_an_early_break_leaves_no_thread_and_does_not_read_the_rest(data, monkeypatch):
    stock, read = reader._EpochReader.run_pipeline, []

    def counted(self, number, *rest):
        read.append(number)
        return stock(self, number, *rest)

    monkeypatch.setattr(reader._EpochReader, "run_pipeline", counted)
    loader = data.train(seed=5, batch_size=2, micro_batch=2)
    before = threading.active_count()
    for _ in range(5):
        with loader.epoch(0) as batches:
            next(batches)
        assert threading.active_count() == before
        assert len(read) <= 7  # of 30: 1 consumed, 3 in the queue, what was under way
        read.clear()
    with pytest.raises(ZeroDivisionError), loader.epoch(0):
        raise ZeroDivisionError
    assert threading.active_count() == before


def test_close_stops_what_is_open(data):
    loader = data.train(seed=5, batch_size=2, micro_batch=2)
    with loader.epoch(0) as batches:
        next(batches)
        loader.close()
        loader.close()
        with pytest.raises(LoaderError, match="was closed"):
            list(batches)


def test_an_error_in_the_thread_arrives(data, monkeypatch):
    broken = Mock(side_effect=OSError("disk on fire"))
    monkeypatch.setattr(reader._EpochReader, "run_pipeline", broken)
    begin, said = time.monotonic(), r"train\.beton failed: OSError: disk on fire"
    with pytest.raises(LoaderError, match=said), data.train(**SIZES).epoch(0) as batches:
        next(batches)
    assert time.monotonic() - begin < 10  # seconds, on a busy machine


@pytest.mark.parametrize("whole", [0, 2])
def test_a_hang_arrives_at_the_limit(data, monkeypatch, whole):
    """Of the first batch, and of a later one, whose limit is shorter."""
    monkeypatch.setattr(reader, "BATCH_TIMEOUT_S" if whole else "FIRST_BATCH_TIMEOUT_S", 0.5)
    monkeypatch.setattr(reader, "CLOSE_TIMEOUT_S", 0.1)
    free, original, done = threading.Event(), reader._EpochReader.run_pipeline, []

    def hang_later(self, *args):
        done.append(None)
        return original(self, *args) if len(done) <= whole else free.wait(30)

    monkeypatch.setattr(reader._EpochReader, "run_pipeline", hang_later)
    begin, said = time.monotonic(), r"no batch for 0\.5 s"
    with pytest.raises(LoaderError, match=said), data.train(**SIZES).epoch(0) as batches:
        assert len(list(batches)) <= whole
    assert 0.4 < time.monotonic() - begin < 20  # seconds, on a busy machine; the read takes 30
    free.set()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_corrupt_jpeg_is_named_and_its_page_is_damaged_unless_it_was_written_so(
    data, tmp_path, threads
):
    folder = shutil.copytree(data.folder, tmp_path / "broken")
    path = folder / "train.beton"
    tables = read_tables(path)
    victim = next(i for i in range(20, 61) if tables.records["mode"][i] == JPG)
    with path.open("r+b") as file:
        file.seek(int(tables.addresses[victim]) + 2)
        file.write(bytes(64))
    plain = Beton(folder, classes=2, size=32)

    def refusal(data) -> str:
        with (
            pytest.raises(DataError) as caught,
            data.train(**SIZES, threads=threads).epoch(0) as batches,
        ):
            list(batches)
        return str(caught.value)

    corrupt = (
        f"data: {path}: cannot decode the JPEG of samples [{victim}]; check the file with"
        " `spiketrain verify`"
    )
    assert refusal(plain) == corrupt
    checked = plain.with_page_checks(1 << 30)
    place = r"damaged: page 0 \(bytes \d+ to \d+, samples 0 to 60\)"
    assert re.search(f"{place} differs from its manifest; restore", refusal(checked))

    known = manifests.read(path)
    about = {"classes": known.classes, "labels": tables.labels.tolist()}
    manifests.describe(path, name=path.name, content=known.content, **about).write(
        path.with_name(path.name + manifests.SUFFIX)
    )
    assert refusal(checked) == corrupt


def test_too_many_threads_are_refused_and_tbb_demanded(monkeypatch):
    most = numba_config.NUMBA_NUM_THREADS
    assert usable_threads(most) == most
    for threads in (0, most + 1):
        with pytest.raises(DataError, match=rf"threads must be in 1\.\.{most} .*; got {threads}"):
            usable_threads(threads)

    missing = Mock(side_effect=ImportError("libtbb.so.12: cannot open shared object file"))
    monkeypatch.setattr(numba_threads.importlib, "import_module", missing)
    assert usable_threads(1) == 1
    with pytest.raises(DataError, match=r"needs TBB; .*threads=1; got: libtbb"):
        usable_threads(2)


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
    assert not [each for each in gc.get_objects() if type(each) is reader._EpochReader]
