"""Cores of a worker: one holder each, for all threads, waited for, free when the holder dies."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.core.cpu_affinity import (
    physical_cores,
    reserve_cores,
)
from pipeline.core.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from pipeline.core.cpu_affinity import reserve_cores
with reserve_cores(1, folder=Path(sys.argv[1])) as cores:
    print(*cores, flush=True)
    time.sleep(60)
"""


def test_all_threads_stay_on_the_cores_until_the_end(tmp_path: Path) -> None:
    before, go_on = os.sched_getaffinity(0), threading.Event()
    waiting = threading.Thread(target=go_on.wait, daemon=True)
    waiting.start()
    seen: list[set[int]] = []
    with reserve_cores(1, folder=tmp_path) as cores:
        assert cores in physical_cores(before).values()
        assert os.sched_getaffinity(waiting.native_id or 0) == set(cores) == os.sched_getaffinity(0)
        later = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        later.start()
        later.join()
        assert seen == [set(cores)]
    assert os.sched_getaffinity(0) == before == os.sched_getaffinity(waiting.native_id or 0)
    go_on.set()


def test_no_core_has_two_holders_and_a_killed_holder_frees_its_cores(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = int(other.stdout.readline().split()[0])
        everything = len(physical_cores(os.sched_getaffinity(0)))
        try:
            if everything > 1:
                with reserve_cores(1, folder=tmp_path) as mine:
                    assert theirs not in mine
            said = f"needs {everything} unreserved cores; this process may use {everything} cores,"
            with (
                pytest.raises(UserError, match=said),
                reserve_cores(everything, folder=tmp_path, timeout_s=0.1),
            ):
                pass
        finally:
            other.send_signal(signal.SIGKILL)
            other.wait()
    with reserve_cores(everything, folder=tmp_path) as mine:
        assert theirs in mine


@pytest.mark.parametrize(
    ("siblings", "logical", "expected"),
    [
        ({}, (0, 1, 3), {"0": (0,), "1": (1,), "3": (3,)}),
        ({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, (0, 1, 2, 3), {"0": (0, 2), "1": (1, 3)}),
        (
            {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"},
            (1, 2, 3),
            {"0": (1,), "2": (2, 3)},
        ),  # one is not for this process
    ],
)
def test_siblings_are_one_core(
    siblings: dict[int, str], logical: tuple[int, ...], expected: dict, tmp_path: Path
) -> None:
    for core, text in siblings.items():
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{text}\n")
    assert physical_cores(logical, topology=tmp_path) == expected
