"""A second driver: on this machine it is refused at once, on another it waits for the lock of a
machine that may be dead.
"""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from pipeline.launch import driver
from pipeline.launch.driver import driver_lock, this_machine

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(sys.argv[2])
file.flush()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Another process holds the folder, in whose name is said."""
    started: list[subprocess.Popen[str]] = []

    def hold(holder: str) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", HOLD, str(tmp_path / "driver.lock"), holder],
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        assert started[-1].stdout is not None and started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.wait()


def other_boot() -> str:
    return f"{socket.gethostname()} 11111111-2222-3333-4444-555555555555"


@pytest.mark.parametrize(
    "holder",
    ["gpu-node-7 0123", other_boot()],
    ids=["another machine", "this one before it was restarted"],
)
def test_the_lock_of_a_machine_that_may_be_dead_is_waited_for(
    tmp_path: Path,
    held: Callable[[str], subprocess.Popen[str]],
    capsys: pytest.CaptureFixture[str],
    holder: str,
) -> None:
    process = held(holder)
    begun, dies = time.monotonic(), threading.Timer(2, process.kill)
    dies.start()
    try:
        with driver_lock(tmp_path):
            assert time.monotonic() - begun > 1.8
            assert (tmp_path / "driver.lock").read_text() == this_machine()
    finally:
        dies.cancel()
    host = holder.partition(" ")[0]
    assert capsys.readouterr().out == (
        f"{tmp_path.name}: is held by {host}: waiting for up to 600 s, in which a dead machine"
        " loses it\n"
    )


def test_one_that_lives_elsewhere_is_named_in_the_end(
    tmp_path: Path, held: Callable[[str], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "PATIENCE_S", 1.2)
    held("gpu-node-7 0123")
    with pytest.raises(UserError) as refusal, driver_lock(tmp_path):
        pass
    assert str(refusal.value).startswith(
        f"{tmp_path.name}: is being trained by another process on gpu-node-7, which still holds"
        " it after "
    )


@pytest.mark.parametrize("holder", [this_machine(), ""], ids=["this machine", "nobody knows whose"])
def test_on_this_machine_it_is_refused_at_once(
    tmp_path: Path, held: Callable[[str], subprocess.Popen[str]], holder: str
) -> None:
    held(holder)
    begun = time.monotonic()
    with pytest.raises(UserError) as refusal, driver_lock(tmp_path):
        pass
    assert (
        str(refusal.value)
        == f"{tmp_path.name}: is being trained by another process on this machine"
    )
    assert 0.9 < time.monotonic() - begun < 10  # `spiketrain runs` may have held it for an instant


def test_a_shorter_name_leaves_nothing_of_a_longer_one(tmp_path: Path) -> None:
    (tmp_path / "driver.lock").write_text("x" * 300)
    for _ in range(2):
        with driver_lock(tmp_path):
            assert (tmp_path / "driver.lock").read_text() == this_machine()
