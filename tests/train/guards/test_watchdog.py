"""A process that hangs ends, and leaves what its threads were at; one that beats does not."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline.track.journal import read
from pipeline.train.guards.watchdog import Watchdog, unreported_hangs
from tests.helpers.events import event

HANGS = """
import sys, threading, time
from pathlib import Path
from pipeline.train.guards.watchdog import Watchdog

def waits_for_ever():
    threading.Event().wait()

with Watchdog(Path(sys.argv[1]), rank=3, patience_s=0.5) as watchdog:
    for _ in range(8):
        time.sleep(0.2)
        watchdog.beat()
    print("hangs now", flush=True)
    waits_for_ever()
"""
GOES_ON = """
import sys, time
from pathlib import Path
from pipeline.train.guards.watchdog import Watchdog

with Watchdog(Path(sys.argv[1]), rank=0, patience_s=3.0) as watchdog:
    for _ in range(7):
        time.sleep(0.5)
        watchdog.beat()
time.sleep(3.5)  # it is called off
"""
OFF = """
import sys, time
from pathlib import Path
from pipeline.train.guards.watchdog import Watchdog

with Watchdog(Path(sys.argv[1]), rank=0, patience_s=3.0) as watchdog:
    with watchdog.off():
        time.sleep(0.5)
        watchdog.beat()  # of a pause between two tries, say
        with watchdog.patient(1.0):  # which is not less than none
            watchdog.beat()
            time.sleep(3.5)
    watchdog.beat()
"""
PATIENT = """
import sys, time
from pathlib import Path
from pipeline.train.guards.watchdog import Watchdog

with Watchdog(Path(sys.argv[1]), rank=0, patience_s=2.0) as watchdog:
    with watchdog.patient(60.0):
        time.sleep(1.0)
        watchdog.beat()
        time.sleep(2.5)
    with watchdog.patient(0.1):  # of two the longer
        time.sleep(1.0)
"""
WORKER = """
import sys, threading, time
from dataclasses import replace
from pathlib import Path
from pipeline.train import worker
from pipeline.train import assemble as compose
from pipeline.train.checkpoint import checkpoints
from pipeline.train.job import RankInfo
from tests.helpers.small import make_run, small_recipe

write, patience_s = checkpoints._write, 4.0

def slowly(file, value):
    time.sleep(1.7)  # five files of a checkpoint
    write(file, value)

def waits_for_ever(*parts):
    threading.Event().wait()

if sys.argv[2] == "hangs":
    compose.build_backend = waits_for_ever
elif sys.argv[2] == "restores":
    newest = compose._newest
    compose._newest = lambda *given, **more: time.sleep(6.0) or newest(*given, **more)
else:
    checkpoints._write = slowly
job = make_run(Path(sys.argv[1]), small_recipe(epochs=1).override({"checkpoints.every": 0}))
worker.run(replace(job, hang_minutes=patience_s / 60), RankInfo())
"""
# each with a watchdog, which ends a process
PROCESSES = {
    "hangs": (HANGS,),
    "goes on": (GOES_ON,),
    "is off": (OFF,),
    "is patient": (PATIENT,),
    "hangs all the same": (
        HANGS.replace(
            "    waits_for_ever()", "    with watchdog.patient(2.0):\n        waits_for_ever()"
        ),
    ),
}


class Ran(NamedTuple):
    """How one of them ended."""

    run: Path
    code: int
    out: str
    err: str
    seconds: float

    @property
    def stacks(self) -> list[Path]:
        return list((self.run / "stacks").glob("*"))


def end_of(run: Path, code: str, *words: str) -> Ran:
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", code, str(run), *words], capture_output=True, text=True, timeout=60
    )
    return Ran(run, ended.returncode, ended.stdout, ended.stderr, time.monotonic() - began)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    return at_once(tmp_path_factory.mktemp("processes"), PROCESSES)


def at_once(folder: Path, processes: dict[str, tuple[str, ...]]) -> dict[str, Ran]:
    """What they do is wait."""
    with ThreadPoolExecutor(len(processes)) as threads:
        begun = {}
        for name, (code, *words) in processes.items():
            run = folder / name
            if not words:
                run.mkdir()
            begun[name] = threads.submit(end_of, run, code, *words)
        return {name: each.result() for name, each in begun.items()}


def test_a_hang_is_written_down_and_ended(ran: dict[str, Ran]) -> None:
    hung = ran["hangs"]
    assert hung.code == 1 and hung.out == "hangs now\n" and hung.seconds < 30
    [file] = hung.stacks
    assert file.name.startswith("rank3-") and "waits_for_ever" in file.read_text()
    (hung.run / "stacks" / "rank0-20260105-120000.txt").touch()  # of one that was killed
    named = f"stacks/{file.name}"
    assert (
        unreported_hangs(hung.run, []) == {named: 3}
        and unreported_hangs(hung.run, [event("hung", stacks=named)]) == {}
    )


@pytest.mark.parametrize("name", ["goes on", "is off", "is patient"])
def test_nobody_else_is_ended_and_nothing_is_left(ran: dict[str, Ran], name: str) -> None:
    assert (ran[name].code, ran[name].stacks) == (0, []), ran[name].err


def test_what_takes_longer_than_the_longer_patience_hangs(ran: dict[str, Ran]) -> None:
    hangs(ran["hangs all the same"], "hangs now\n", most_s=30)


def hangs(hung: Ran, out: str, most_s: int) -> None:
    assert (hung.code, hung.out) == (1, out) and 2.0 < hung.seconds < most_s
    assert ["waits_for_ever" in file.read_text() for file in hung.stacks] == [True]


def test_without_patience_nobody_watches(tmp_path: Path) -> None:
    with Watchdog(tmp_path / "unwatched", rank=0, patience_s=0.0) as watchdog:
        watchdog.beat()
    assert not (tmp_path / "unwatched").exists()


@pytest.mark.full
def test_a_worker_that_restores_or_writes_for_long_goes_on_and_one_that_hangs_ends(
    tmp_path: Path,
) -> None:
    workers = at_once(tmp_path, {act: (WORKER, act) for act in ("hangs", "restores", "writes")})
    hangs(workers["hangs"], "", most_s=60)
    for each in (workers["restores"], wrote := workers["writes"]):
        assert (each.code, each.stacks) == (0, []), each.err
    [event] = [
        event for event in read(wrote.run / "journal.jsonl") if event["event"] == "checkpoint"
    ]
    assert event["write_s"] > 4.0
