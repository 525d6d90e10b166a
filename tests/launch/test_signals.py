"""What whoever drives makes of signals."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.launch import signals
from pipeline.launch.signals import ECHO_S, StopRequest, blocked_signal, on_stop_signals
from pipeline.launch.suite_runs import _stop_requests


class AtOnce(Exception):
    """Stands for the end of this process."""


@pytest.fixture
def send(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sends a signal to this process, well after the one before."""
    monkeypatch.setattr(signals, "ECHO_S", 0.01)

    def end(code: int) -> None:
        raise AtOnce(code)

    monkeypatch.setattr(os, "_exit", end)

    def send(number: int) -> None:
        time.sleep(0.02)
        os.kill(os.getpid(), number)

    return send


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_asks_to_save_and_the_second_ends_at_once(
    tmp_path: Path, send: Callable[[int], None], number: int
) -> None:
    said: list[str] = []
    request = StopRequest(tmp_path, said.append)
    with on_stop_signals(request.hear):
        request.report()
        assert said == []
        send(number)
        assert (tmp_path / "stop").read_text() == signal.Signals(number).name
        assert said == []  # in the middle of whatever the main thread does
        for _ in range(2):
            request.report()
        assert said == [
            f"{signal.Signals(number).name}: saving after this step; once more to stop at once"
        ]
        with pytest.raises(AtOnce):
            send(number)
    assert said[1:] == ["stopped at once; the last checkpoint counts"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_the_signals_of_schedulers_and_lost_terminals_never_mean_at_once(
    tmp_path: Path, send: Callable[[int], None], number: int
) -> None:
    with on_stop_signals(StopRequest(tmp_path, print).hear):
        for _ in range(2):
            send(number)
        assert (tmp_path / "stop").read_text() == signal.Signals(number).name
        with pytest.raises(AtOnce):
            send(signal.SIGTERM)


@pytest.fixture
def ignored() -> Iterator[None]:
    """As nohup does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_lost_terminal_that_was_ignored_before_stays_so(
    tmp_path: Path, send: Callable[[int], None], ignored: None
) -> None:
    with on_stop_signals(StopRequest(tmp_path, print).hear):
        send(signal.SIGHUP)
        assert not (tmp_path / "stop").exists()
        send(signal.SIGTERM)
        assert (tmp_path / "stop").exists()


def test_the_two_signals_of_one_wish_to_stop_a_suite_are_one() -> None:
    """As coreutils' timeout sends them: to its child, and to the group."""
    with _stop_requests() as asked:
        for pause in (0.05, ECHO_S + 0.05):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(pause)
        assert asked() == 1
        os.kill(os.getpid(), signal.SIGUSR1)
        assert asked() == 1
        time.sleep(ECHO_S + 0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked() == 2


def test_what_was_heard_before_is_heard_again_afterwards() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with on_stop_signals(print):
        assert all(callable(signal.getsignal(number)) for number in numbers)
    assert [signal.getsignal(number) for number in numbers] == before


CHILD = "import os, signal; os.kill(os.getpid(), signal.SIGHUP); print('alive')"


def test_a_signal_that_is_withheld_reaches_us_and_our_children_never() -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, frame: got.append(number))
    try:
        with blocked_signal(signal.SIGHUP):
            os.kill(os.getpid(), signal.SIGHUP)
            child = subprocess.run(
                [sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True, timeout=60
            )
            assert (child.returncode, child.stdout) == (0, "alive\n")
        assert got == [signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, before)
