"""A run that is driven by `spiketrain` in a process of its own, and the eyes of whoever wants to
hurt it.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from pipeline.track.journal import Follower
from tests.helpers.waiting import until


class Driver:
    """`spiketrain WORDS --runs ...` of the run, started in `folder`; what it says is appended to
    `log`.

    With a `terminal`, the descriptor of one, it is in a session of its own there.
    It dies with whoever has started it: a test that takes too long ends its whole process, and
    cleans up nothing. The journal is followed from where it stands now: of each event `wait_for`
    and the like see the next ones only."""

    def __init__(
        self,
        *words: str,
        run: Path,
        folder: Path,
        environment: Mapping[str, str] = {},
        terminal: int | None = None,
    ) -> None:
        self.run = run
        self.log = run.parent / f"{run.name}.log"
        self.log.parent.mkdir(exist_ok=True)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                # No preexec_fn, which may hang where a process has threads.
                [
                    *("setpriv", "--pdeathsig", "KILL", sys.executable),
                    *("-m", "pipeline", *words, "--runs", str(run.parent)),
                ],
                stdin=terminal,
                stdout=log if terminal is None else terminal,
                stderr=subprocess.STDOUT,
                start_new_session=terminal is not None,
                cwd=folder,
                env={**os.environ, **environment},
            )
        journal = run / "journal.jsonl"
        self.follower = Follower(journal, offset=journal.stat().st_size if journal.exists() else 0)

    def wait_for(
        self, wanted: Callable[[dict[str, Any]], bool], *, within: float = 200.0
    ) -> dict[str, Any]:
        return until(
            lambda: next((event for event in self.follower.poll() if wanted(event)), None),
            within=within,
            process=self.process,
            said=lambda: self.log.read_text()[-3000:],
            pause=0.005,
        )

    def at_step(self, step: int) -> None:
        self.wait_for(lambda event: event["event"] == "step" and event["step"] >= step)

    def workers(self) -> list[psutil.Process]:
        """Of the cluster that it has started by itself."""
        return workers_below(psutil.Process(self.process.pid))

    def end(self, *, within: float = 300.0) -> int:
        return self.process.wait(within)

    def kill(self) -> None:
        """Whatever is left of it."""
        if self.process.poll() is None:
            for each in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                each.kill()
            self.process.wait()


def workers_below(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for each in process.children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(each.cmdline()):
                found.append(each)
        except psutil.NoSuchProcess:
            continue
    return found
