"""A driver does not outlive the tests that started it, however they end."""

import subprocess
import sys
import time
from pathlib import Path

import psutil

OWNER = """
import sys
from pathlib import Path
from tests.helpers.driver import Driver

folder = Path(sys.argv[1])
print(Driver("launch", run=folder / "run", folder=folder).process.pid, flush=True)
sys.stdin.read()
"""


def test_a_driver_dies_with_whoever_has_started_it(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()  # in the place of ours, as it is started in that folder
    (tmp_path / "pipeline" / "__init__.py").touch()
    started = tmp_path / "started"  # by then setpriv has asked for the signal
    (tmp_path / "pipeline" / "__main__.py").write_text(
        f"import pathlib, time; pathlib.Path({str(started)!r}).touch(); time.sleep(60)"
    )
    words = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        driver = psutil.Process(int(owner.stdout.readline()))
        deadline = time.monotonic() + 20
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert started.exists() and is_alive(driver)
        owner.kill()
    deadline = time.monotonic() + 20
    while is_alive(driver) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(driver)


def is_alive(process: psutil.Process) -> bool:
    """And no zombie, which nobody may have waited for yet."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
