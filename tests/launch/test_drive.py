"""What the driver makes of signals."""

from __future__ import annotations

import io
import os
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.launch import drive
from pipeline.launch.drive import stops_on_signal


class AtOnce(Exception):
    """Stands for the end of this process."""


@pytest.fixture
def send(monkeypatch: pytest.MonkeyPatch):
    """Sends a signal to this process, well after the one before."""
    monkeypatch.setattr(drive, "ECHO_S", 0.01)

    def end(code: int) -> None:
        raise AtOnce(code)

    monkeypatch.setattr(os, "_exit", end)

    def send(number: int) -> None:
        time.sleep(0.02)
        os.kill(os.getpid(), number)

    return send


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_asks_to_save_and_the_second_ends_at_once(tmp_path: Path, send, number: int) -> None:
    said = io.StringIO()
    with stops_on_signal(tmp_path, Console(file=said, width=120)):
        send(number)
        assert (tmp_path / "stop").read_text() == signal.Signals(number).name
        with pytest.raises(AtOnce):
            send(number)
    assert "saving after this step; once more to stop at once" in said.getvalue() and "stopped at once" in said.getvalue()


def test_a_schedulers_signal_never_means_at_once(tmp_path: Path, send) -> None:
    with stops_on_signal(tmp_path, Console(file=io.StringIO())):
        for number in (signal.SIGUSR1, signal.SIGUSR1):
            send(number)
        assert (tmp_path / "stop").exists()
        with pytest.raises(AtOnce):
            send(signal.SIGTERM)
