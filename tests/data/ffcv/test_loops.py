"""The compiled loops over a batch are saved for later processes, by their sources."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
    made = [*augment.LOOPS.values(), *event_frames.LOOPS.values()]
    assert all(loop.py_func.__closure__ is None for loop in made)
    places = {(loop.py_func.__qualname__, loop.stats.cache_path) for loop in made}
    assert len(places) == len(made) == 6


def test_another_source_has_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = tmp_path / "ffcv"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("__pycache__"))
    usual = loops.saved_loops()
    monkeypatch.setattr(loops, "__file__", str(copy / "loops.py"))
    assert loops.saved_loops() == usual
    for name in ("bicubic.py", "event_frames.py"):
        with (copy / name).open("a") as source:
            source.write("\n")
        before, usual = usual, loops.saved_loops()
        assert usual != before and usual is not None and usual.is_dir()


def test_where_no_folder_can_be_written_each_process_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert loops.saved_loops() is None
    monkeypatch.setattr(loops, "FOLDER", None)
    for saved in (True, False):
        made = loops.batch_loop(event_frames.decode_recordings, parallel=False, saved=saved)
        assert made.stats.cache_path is None
