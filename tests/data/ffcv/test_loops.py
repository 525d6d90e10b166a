"""The compiled loops over a batch are saved for later processes, by their sources."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core import random, saved_loops
from pipeline.core.files import lock_within
from pipeline.data.datasets.beton import Beton
from pipeline.data.ffcv import augment, event_frames, loops

ROOT = Path(loops.__file__).parent

LATER = """
import sys
from pipeline.data.datasets.beton import Beton
from pipeline.data.ffcv import augment

with Beton(sys.argv[1], classes=2, size=24).val(micro_batch=2).epoch(0) as batches:
    next(batches)
stats = augment.LOOPS[False, False].stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def test_a_later_process_compiles_nothing(raw):
    folder, _ = raw
    with Beton(folder, classes=2, size=24).val(micro_batch=2).epoch(0) as batches:
        next(batches)
    words = (sys.executable, "-c", LATER, str(folder))
    later = subprocess.run(words, capture_output=True, text=True, check=True)
    assert later.stdout.split() == ["1", "0"], later.stderr


def test_every_loop_has_one_name_and_its_own_folder_of_threads():
    """numba tells the loops of a folder apart by their names, and by what they are closures over,
    which differs between processes.
    """
    all_loops = [*augment.LOOPS.values(), *event_frames.LOOPS.values()]
    assert all(loop.py_func.__closure__ is None for loop in all_loops)
    places = {(loop.py_func.__qualname__, loop.stats.cache_path) for loop in all_loops}
    assert len(places) == len(all_loops) == 6


def test_another_source_has_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(saved_loops.numba_config, "CACHE_DIR", "")
    copy = tmp_path / "ffcv"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("__pycache__"))
    usual = loops.saved_loops()
    shutil.copy(random.__file__, copy.parent)
    monkeypatch.setattr(loops, "__file__", str(copy / "loops.py"))
    monkeypatch.setattr(random, "__file__", str(tmp_path / "random.py"))
    assert loops.saved_loops() == usual
    for file in (copy / "bicubic.py", copy / "event_frames.py", tmp_path / "random.py"):
        with file.open("a") as source:
            source.write("\n")
        before, usual = usual, loops.saved_loops()
        assert usual != before and usual is not None and usual.is_dir()


def test_where_no_folder_can_be_written_each_process_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(saved_loops.numba_config, "CACHE_DIR", "")
    assert loops.saved_loops() is None
    assert made(saved=True).stats.cache_path is not None
    assert made(saved=False).stats.cache_path is None
    monkeypatch.setattr(loops, "FOLDER", None)
    assert made(saved=True).stats.cache_path is None


@pytest.mark.parametrize("broken", ["serial", "sub"])
def test_where_numba_would_choose_another_folder_nothing_is_saved(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loops, "FOLDER", tmp_path)
    if broken == "serial":
        (tmp_path / "serial").touch()
    else:
        shutil.rmtree(sub := Path(made().stats.cache_path))
        sub.touch()
    assert made().stats.cache_path is None


def double(numbers):
    numbers *= 2


def made(**options: bool) -> Any:
    return loops.batch_loop(double, parallel=False, **options)


def test_a_cache_that_fails_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loops, "FOLDER", tmp_path)
    numbers = np.ones(2)
    made()(numbers)
    [saved] = tmp_path.rglob("*.nbc")
    saved.write_bytes(b"")
    with pytest.warns(UserWarning, match="could not load .* compiles it .EOFError"):
        made()(numbers)
    again = made()
    again(numbers)
    assert numbers.tolist() == [8, 8]
    assert list(again.stats.cache_hits.values()) == [1]  # the damaged file was written anew

    loop = made()
    monkeypatch.setattr(loop._cache._numbas._cache_file, "_save_data", full)
    saved.unlink()
    with pytest.warns(UserWarning, match="could not save .* No space left"):
        loop(numbers)
    assert numbers.tolist() == [16, 16]


def test_a_lock_that_another_process_holds_is_not_waited_for_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loops, "FOLDER", tmp_path)
    monkeypatch.setattr(saved_loops, "LOCK_TIMEOUT_S", 0.1)
    (tmp_path / "serial").mkdir()
    with (tmp_path / "serial/lock").open("a") as held:
        assert lock_within(held, 0)
        with pytest.warns(UserWarning, match="could not save .* another process holds its lock"):
            made()(np.ones(2))
    assert not list(tmp_path.rglob("*.nbc"))


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_without_a_compiler_nothing_is_read():
    """The kernels of neurons can be imported all the same."""
    imports = "import pipeline.spiking.kernels.cpu, pipeline.data.ffcv.loops"
    words = (sys.executable, "-c", imports)
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    told = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert told.returncode == 1 and "got NUMBA_DISABLE_JIT=1" in told.stderr
