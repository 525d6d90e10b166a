"""Whatever becomes of what shows a run, it trains to its end, and MLflow is told.

A second driver: on this machine it is refused at once, on another it waits for the lock of a
machine that may be dead.

What whoever drives makes of signals.
"""

import errno
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from rich.console import Console

from pipeline.core.errors import UserError
from pipeline.launch import driver
from pipeline.launch import suite as suites
from pipeline.launch.driver import (
    AT_ONCE,
    ECHO_S,
    Inline,
    StopRequest,
    drive,
    driver_lock,
    on_stop_signals,
    this_machine,
)
from pipeline.launch.ray import LaunchError, WorkersEnded
from pipeline.launch.ray_cluster import blocked_signal
from pipeline.launch.suite import train_side_by_side
from pipeline.track.journal import Follower, Journal
from pipeline.train.checkpoint import CheckpointStore, owner_of, store_at
from pipeline.train.guards import storage_outage
from pipeline.train.job import Job, note_death
from tests.faults.test_checkpoint_write import fail_first
from tests.helpers.events import event
from tests.helpers.small import events
from tests.helpers.waiting import until

STALE = OSError(errno.ESTALE, "Stale file handle")


class Launcher:
    workers = 1

    def __init__(self, meanwhile: Callable[[int], None] = lambda step: None) -> None:
        self.meanwhile = meanwhile

    def run(self, job: Job, attempt: str) -> dict[str, Any]:
        with Journal(Path(job.run) / "journal.jsonl", attempt=0) as journal:
            journal.write(event("start", step=0, total_steps=3, world_size=1, rule="SLTT"))
            for step in range(1, 4):
                time.sleep(0.06)
                self.meanwhile(step)
                journal.write(event("evaluation", step=step))
            journal.write(event("finish", step=3))
        return {"steps": 3}


@pytest.fixture
def driven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any] | None]:
    monkeypatch.setattr(driver, "POLL_S", 0.01)
    monkeypatch.setattr(driver, "commit", lambda: "c")
    job = Job(run=str(tmp_path), study="s", data_fingerprint="d", commit="c", recipe={}, run_id="r")

    def run(file: Any, launcher: Launcher | None = None) -> dict[str, Any] | None:
        """Drive it to its end, at which MLflow is told."""
        started: Any = launcher or Launcher()
        mirror = Mock()
        monkeypatch.setattr(driver, "Mirror", Mock(return_value=mirror))
        try:
            return drive(job, started, Console(file=file, width=200))
        finally:
            mirror.close.assert_called_once()

    return run


class Lost(io.StringIO):
    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error, self.refused = error, 0

    def write(self, text: str) -> int:
        if "start " in self.getvalue():
            self.refused += 1
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        OSError(errno.EIO, "gone"),
    ],
    ids=["a full disk", "a pipe that nobody reads", "a terminal that is gone"],
)
def test_a_terminal_that_takes_no_more_costs_nothing_but_what_it_would_have_shown(
    driven: Callable[..., Any], capfd: pytest.CaptureFixture[str], error: OSError
) -> None:
    file = Lost(error)
    assert driven(file) == {"steps": 3}
    assert file.refused == 1 and "evaluation" not in file.getvalue()
    assert (
        capfd.readouterr().err
        == f"the output has ended: {error.strerror}; training continues, and its journal has"
        f" all events\n"
    )


FULL = """
import sys
from rich.console import Console
from pipeline.launch.driver import ignore_lost_terminal
console = Console()
ignore_lost_terminal(console)
console.print("x" * 100)
print("the table at the end")
sys.exit(130)
"""


def test_on_a_full_disk_the_exit_status_stays() -> None:
    """Python itself ends with 120 where it cannot write the rest of what was printed."""
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", FULL], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (ended.returncode, ended.stderr.count("\n")) == (
        130,
        1,
    ) and "No space left on device" in ended.stderr


def test_a_journal_that_cannot_be_read_for_a_moment_is_read_again(
    driven: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = fail_first(
        monkeypatch, Follower, "poll", STALE, times=3, where=lambda follower: follower.offset > 0
    )
    file = io.StringIO()
    assert driven(file) == {"steps": 3} and len(failed) == 3
    assert file.getvalue().count("the journal cannot be read (Stale file handle)") == 1
    assert [f"evaluation after step {step}" in file.getvalue() for step in (1, 2, 3)] == [True] * 3


def test_a_mistake_in_what_is_shown_ends_the_showing_alone(
    driven: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistaken = Mock(side_effect=KeyError("top1"))
    monkeypatch.setattr("pipeline.launch.progress._lines", mistaken)
    file = io.StringIO()
    assert driven(file) == {"steps": 3}
    assert (
        file.getvalue().count("the progress display has stopped (KeyError: 'top1')") == 1
        and "finished" not in file.getvalue()
    )


def hang(folder: Path, failure: LaunchError, *ranks: int) -> Callable[[int], None]:
    """An end of the workers in which worker 2 died and these hung."""

    def end(step: int) -> None:
        note_death(folder, worker=2, error="KeyError: 'cable'")
        (folder / "stacks").mkdir(exist_ok=True)
        for rank in ranks:
            (folder / "stacks" / f"rank{rank}-20260105-120000.txt").write_text("Timeout (0:30:00)!")
        raise failure

    return end


def lost_workers(folder: Path) -> list[tuple[str, int]]:
    return [(event["event"], event["worker"]) for event in events(folder, "hung", "died")]


def test_workers_that_have_hung_are_named_with_their_stacks_in_the_place_of_a_lost_connection(
    driven: Callable[..., Any], tmp_path: Path
) -> None:
    stacks = [f"{tmp_path}/stacks/rank{rank}-20260105-120000.txt" for rank in range(2)]
    said = (
        "or a worker that it waited for, hung for longer than --hang-minutes; the stacks of its"
        " threads are in"
    )
    closed = WorkersEnded("worker 0: Connection closed by peer")
    for ranks, line in (
        ((1,), f"worker 1, {said} {stacks[1]}"),
        ((), str(closed)),  # and what hung before is told
        ((0, 1), f"worker 0, {said} {stacks[0]}"),
    ):
        with pytest.raises(LaunchError, match=f"^{re.escape(line)}$"):
            driven(io.StringIO(), Launcher(hang(tmp_path, closed, *ranks)))
    assert lost_workers(tmp_path) == [
        ("hung", 1),
        ("died", 2),
        ("died", 2),
        ("hung", 0),
        ("died", 2),
    ]


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (WorkersEnded("worker 2: it is full", is_for_the_user=True), UserError),
        (LaunchError("no place"), LaunchError),
    ],
)
def test_another_end_keeps_its_line_and_the_journal_is_told_of_workers_all_the_same(
    driven: Callable[..., Any], tmp_path: Path, failure: LaunchError, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=f"^{failure}$"):
        driven(io.StringIO(), Launcher(hang(tmp_path, failure, 1)))
    assert lost_workers(tmp_path) == [("hung", 1), ("died", 2)]


def test_a_journal_that_takes_no_more_leaves_the_line_that_the_workers_ended_with(
    driven: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(step: int) -> None:
        note_death(tmp_path, worker=2, error="KeyError: 'cable'")
        full = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(Journal, "write", Mock(side_effect=full))
        raise LaunchError("worker 2: 'cable'")

    with pytest.raises(LaunchError, match=r"^worker 2: 'cable'") as ended:
        driven(io.StringIO(), Launcher(end))
    assert ended.value.__notes__ == [
        "the journal could not be written: [Errno 28] No space left on device"
    ]


def test_whoever_asks_to_stop_is_heard_and_told_so_on_storage_that_is_away(
    driven: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = fail_first(
        monkeypatch, Path, "write_text", STALE, times=2, where=lambda path: path.name == "stop"
    )

    def ask(step: int) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            until((tmp_path / "stop").exists, within=20, pause=0.01)

    file = io.StringIO()
    driven(file, Launcher(ask))
    assert len(failed) == 2 and (tmp_path / "stop").read_text() == "SIGTERM"
    assert (
        file.getvalue().count(
            "SIGTERM: saving after this step; another Ctrl-C or SIGTERM stops at once"
        )
        == 1
    )


def test_at_once_is_at_once_where_nothing_can_be_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python refuses a write in the middle of another one to the same stream."""
    monkeypatch.setattr(os, "_exit", sys.exit)

    reentrant = Mock(side_effect=RuntimeError("reentrant call inside <_io.BufferedWriter>"))
    request = StopRequest(tmp_path, reentrant)
    request.on_signal(signal.SIGTERM)
    assert (tmp_path / "stop").read_text() == "SIGTERM"
    with pytest.raises(SystemExit, match=r"^130$"):
        request.on_signal(signal.SIGTERM)


def test_a_place_of_checkpoints_that_does_not_answer_is_waited_for_and_then_owned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, said = OSError(errno.EIO, "Input/output error"), list[str]()
    failed = fail_first(monkeypatch, CheckpointStore, "read", error, times=2)
    monkeypatch.setattr(storage_outage, "FIRST_PAUSE_S", 0.01)
    job = Job(
        run=str(tmp_path / "run"),
        study="s",
        data_fingerprint="d",
        commit="c",
        recipe={},
        run_id="r",
    )
    assert (
        driver._with_checkpoint_token(job, said.append) is job and failed == []
    )  # its folder's locks are enough
    place = tmp_path / "elsewhere"
    tokens = [
        driver._with_checkpoint_token(replace(job, checkpoints=str(place)), said.append).store_token
        for _ in range(2)
    ]
    assert said == [f"{place} does not answer; waiting for it: [Errno 5] Input/output error"]
    owner = owner_of(store_at(str(place), tmp_path))
    assert owner is not None and tokens[1] == owner.token != tokens[0]  # a token of each start


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(sys.argv[2])
file.flush()
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def held(folder: Path, holder: str) -> Iterator[subprocess.Popen[str]]:
    """A process of this holder has the lock of the run's driver, until it is killed."""
    words = [sys.executable, "-c", HOLD, str(folder / "driver.lock"), holder]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    "holder",
    [f"gpu-node-7 {'0' * 300}", f"{socket.gethostname()} 11111111-2222-3333-4444-555555555555"],
    ids=["another machine", "this one before it was restarted"],
)
def test_the_lock_of_a_machine_that_may_be_dead_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], holder: str
) -> None:
    with held(tmp_path, holder) as process:
        begun = time.monotonic()
        threading.Timer(2, process.kill).start()
        with driver_lock(tmp_path):
            assert time.monotonic() - begun > 1.8
            assert (tmp_path / "driver.lock").read_text() == this_machine()
    host = holder.partition(" ")[0]
    assert capsys.readouterr().out == (
        f"{tmp_path.name}: is locked by a process on {host}: waiting for up to 600 s; if the"
        " machine is dead, its lock ends in that time\n"
    )


@pytest.mark.parametrize(
    ("holder", "said"),
    [
        ("gpu-node-7 0123", "gpu-node-7, which still holds the lock after "),
        (this_machine(), "this machine$"),
        ("", "this machine$"),
    ],
    ids=["elsewhere", "this machine", "nobody knows whose"],
)
def test_a_driver_that_lives_keeps_a_second_one_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: str, said: str
) -> None:
    """On this machine at once, but `spiketrain runs` may have held it for an instant."""
    monkeypatch.setattr(driver, "PATIENCE_S", 1.2 if holder.startswith("gpu-node-7 ") else 600.0)
    trained = f"{tmp_path.name}: is being trained by another process on "
    with held(tmp_path, holder):
        begun = time.monotonic()
        with pytest.raises(UserError, match=f"^{trained}{said}"), driver_lock(tmp_path):
            pass
        assert 0.9 < time.monotonic() - begun < 10


@pytest.fixture
def send(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sends a signal that is no echo; what would end this process at once raises SystemExit."""
    monkeypatch.setattr(driver, "ECHO_S", 0.01)
    monkeypatch.setattr(os, "_exit", sys.exit)

    def send(number: int) -> None:
        time.sleep(0.02)
        os.kill(os.getpid(), number)

    return send


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_the_first_asks_to_save_and_the_second_ends_at_once(
    tmp_path: Path, send: Callable[[int], None], number: int
) -> None:
    """The signals of schedulers and lost terminals never mean "at once"."""
    said: list[str] = []
    request, name = StopRequest(tmp_path, said.append), signal.Signals(number).name
    with on_stop_signals(request.on_signal):
        request.report()
        assert said == []
        send(number)
        # Nothing is printed in the middle of whatever the main thread does.
        assert (tmp_path / "stop").read_text() == name and said == []
        for _ in range(2):
            request.report()
        assert said == [f"{name}: saving after this step; another Ctrl-C or SIGTERM stops at once"]
        send(signal.SIGUSR1)
    (tmp_path / "stop").write_text(AT_ONCE)  # as a suite does at its second signal
    for asked in (request, StopRequest(tmp_path, said.append)):
        with on_stop_signals(asked.on_signal), pytest.raises(SystemExit, match=r"^130$"):
            send(signal.SIGTERM if number in driver.SAVING_SIGNALS else number)
    assert said[1:] == 2 * ["stopped at once; a resume continues from the last checkpoint"]


def test_a_lost_terminal_that_was_ignored_before_stays_so(
    tmp_path: Path, send: Callable[[int], None]
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_stop_signals(StopRequest(tmp_path, print).on_signal):
            send(signal.SIGHUP)
            assert not (tmp_path / "stop").exists()
            (tmp_path / "stop").touch()
            send(signal.SIGTERM)  # the first signal of a run that a file has asked to save
    finally:
        signal.signal(signal.SIGHUP, before)


def test_two_signals_of_one_wish_are_one() -> None:
    heard: list[signal.Signals] = []
    with on_stop_signals(heard.append):
        for pause in (0.05, ECHO_S + 0.05):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(pause)
        assert heard == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM] * 2


@pytest.mark.parametrize(
    ("heard", "at_once"),
    [
        ([signal.SIGTERM], False),
        ([signal.SIGTERM, signal.SIGUSR1], False),
        ([signal.SIGTERM, signal.SIGTERM], True),
        ([signal.SIGUSR1, signal.SIGHUP, signal.SIGINT], True),
    ],
)
def test_a_suite_stops_its_runs_at_once_only_by_a_second_signal_of_a_user(
    monkeypatch: pytest.MonkeyPatch, heard: list[signal.Signals], at_once: bool
) -> None:
    asked: list[bool] = []
    run = SimpleNamespace(
        stop=lambda at_once: asked.append(at_once), has_ended=lambda: True, failure=lambda: None
    )
    suite: Any = SimpleNamespace(
        remaining=lambda: [] if asked else [SimpleNamespace(name="one")],
        is_over=lambda name: True,
        can_start=lambda recipe: True,
        folders={"one": Path("nowhere")},
        job=lambda recipe: None,
    )

    @contextmanager
    def signals_come(hear: Callable[[signal.Signals], None]) -> Iterator[None]:
        monkeypatch.setattr(suites.time, "sleep", lambda seconds: [*map(hear, heard)])
        yield

    monkeypatch.setattr(suites, "on_stop_signals", signals_come)
    monkeypatch.setattr(suites, "_ChildDriver", lambda *given: run)
    train_side_by_side(suite, Inline(), 1, Console())
    assert asked == [at_once]


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
