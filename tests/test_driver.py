"""A driver does not outlive the tests that started it, however they end."""

import subprocess
import sys
from pathlib import Path

import psutil

from tests.helpers.waiting import until

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
        until(started.exists, within=20)
        assert is_alive(driver)
        owner.kill()
    until(lambda: not is_alive(driver), within=20)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
