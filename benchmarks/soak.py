"""Kills workers, nodes and drivers of one training at random, and counts afterwards what became of
its samples.

Command:  python -m benchmarks.soak [--minutes 20] [--seed N] [--pause 15,45]
Result:   commit 14580ba4833a, 2 cores of an Intel Xeon, torch 2.13, nothing else computing: 29
          kills in 20.3 min, 10051 steps in the history that survived, each sample once in each of
          157 epochs and what follows; of the time 27 % went to recovery

    killed    times   seconds to go on: median, least, most     steps rolled back: mean, most
    driver        6                       16.1   14.1  17.7                       17.8    37
    node          8                       11.2   10.6  12.1                       20.0    44
    worker       15                        9.2    8.3  10.1                       20.7    48

          commit aa085d6a9b29, such a machine, when it was slower by a quarter: 28 kills in 20.0
          min, 9302 steps, each sample once in 145 epochs; driver (6) 17.8 s, node (7) 11.8, worker
          (15) 9.7, medians; 28 % of the time

          commit 21e29ed29c81, 2 cores of an AMD EPYC, beside tests all the while: 21 kills in 20.4
          min, 4753 steps, each sample once; driver (4) 37.3 s, node (5) 25.1, worker (12) 22.4,
          medians

A cluster of Ray with two nodes of one core each (`ray.cluster_utils`), on it `spiketrain launch`
with two workers and `--or-resume`. Every 15 to 45 seconds of training one thing is killed by
SIGKILL: a worker, a node (another joins at once), or the driver (which is launched again). A rule
writes down which samples each batch had (`benchmarks/recorded.py`), by what is in them. A start
takes back the steps from its own on that were trained before it; of the history that survives,
every sample of an epoch must be in one batch, and in no second one (`benchmarks/survived.py`).

The table says how often each was killed and the seconds from the kill to the next batch that was
trained anew, without waiting for what had been rolled back; those steps are listed apart. Exits
with 1 where a sample is lost or doubled, or a run does not come back.
"""

import argparse
import os
import random
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.recorded import BATCH, SAMPLES
from benchmarks.survived import wrong
from pipeline.core.code_version import commit
from pipeline.core.printing import new_console, number, print_table
from pipeline.launch.ray_cluster import NODE_SETTINGS
from pipeline.measure.memory import device_here, hardware
from pipeline.track.journal import Follower, Record, last, read

PATIENCE_S = 180.0
WORLD = 2
RECIPE = """
from benchmarks.recorded import recorded

def recipe():
    return recorded({into!r})
"""


@dataclass(frozen=True)
class Kill:
    """One of them, and what it cost."""

    what: str
    seconds: float
    """until a batch was trained in the attempt that followed"""
    rolled_back: int
    """steps that were trained again"""


class Training:
    """The run, its cluster, and ways to hurt them."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        self.folder = folder
        self.run = folder / "runs" / "soak"
        self.journal = self.run / "journal.jsonl"
        self.records = Follower(folder / "records.jsonl")
        self.trained: list[Record] = []
        self.cluster: Any = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(WORLD)]
        (folder / "soak.py").write_text(RECIPE.format(into=str(self.records.path)))
        self.launch()

    def launch(self) -> None:
        words = [
            "launch",
            str(self.folder / "soak.py"),
            "--workers",
            str(WORLD),
            "--address",
            self.cluster.address,
        ]
        words += [
            "--device",
            "cpu",
            "--runs",
            str(self.run.parent),
            "--name",
            "soak",
            "--or-resume",
            "--trust",
            "benchmarks",
        ]
        with (self.folder / "driver.log").open("a") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "pipeline", *words], stdout=log, stderr=log
            )

    def kill_worker(self) -> None:
        """Of either rank."""
        workers = [
            each
            for each in psutil.Process().children(recursive=True)
            if "RayTrainWorker" in _title(each)
        ]
        random.choice(workers).send_signal(signal.SIGKILL)

    def kill_node(self) -> None:
        self.cluster.remove_node(self.nodes.pop(random.randrange(WORLD)), allow_graceful=False)
        self.nodes.append(self.cluster.add_node(num_cpus=1))

    def kill_driver(self) -> None:
        self.driver.kill()
        self.driver.wait()
        self.launch()

    def steps(self) -> list[Record]:
        """What was trained so far, in order. Only what is new is read: a driver that starts needs
        the cores more.
        """
        self.trained += self.records.poll()
        return self.trained

    def stop(self) -> None:
        """Save and end, as by Ctrl-C."""
        self.driver.send_signal(signal.SIGINT)
        if self.driver.wait(PATIENCE_S) != 130:
            raise SystemExit(
                f"soak: the driver ended with {self.driver.returncode}; see"
                f" {self.folder / 'driver.log'}"
            )

    def close(self) -> None:
        if self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait()
        self.cluster.shutdown()


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""  # it has ended meanwhile


def suffered(training: Training, what: str, act: Callable[[], None]) -> Kill:
    """`act`, and wait until training goes on in an attempt of its own.

    Raises: SystemExit when it does not.
    """
    before, begun = len(training.steps()), time.time()
    act()
    while True:
        time.sleep(0.1)
        start = last(training.journal, "start")
        assert start is not None, "something was trained before"
        if start["time"] > begun:
            anew = next(
                (line for line in training.steps()[before:] if line["time"] > start["time"]), None
            )
            if anew is not None:
                newest = max(
                    (line["step"] for line in training.steps() if line["time"] < start["time"]),
                    default=-1,
                )
                return Kill(what, anew["time"] - begun, max(0, newest + 1 - anew["step"]))
        if time.time() - begun > PATIENCE_S or training.driver.poll() is not None:
            raise SystemExit(
                f"soak: after a {what} was killed the run did not go on; see {training.folder}"
            )


def print_kills(kills: Sequence[Kill]) -> None:
    titles = (
        "times",
        "seconds to go on: median",
        "least",
        "most",
        "steps rolled back: mean",
        "most",
    )
    rows = []
    for what in sorted({kill.what for kill in kills}):
        of = [kill for kill in kills if kill.what == what]
        seconds, back = [kill.seconds for kill in of], [kill.rolled_back for kill in of]
        row = (
            len(of),
            f"{statistics.median(seconds):.1f}",
            f"{min(seconds):.1f}",
            f"{max(seconds):.1f}",
        )
        rows.append((what, *map(str, row), f"{statistics.mean(back):.1f}", str(max(back))))
    print_table(new_console(), ("killed", *map(number, titles)), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pause",
        default="15,45",
        help="seconds of training between two kills, at least and at most",
    )
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    least, most = map(float, arguments.pause.split(","))
    os.environ.update(
        PYTHONPATH=str(Path.cwd()),
        RAY_USAGE_STATS_ENABLED="0",
        RAY_worker_niceness="0",
        OMP_NUM_THREADS="1",
    )
    os.environ.update(
        NODE_SETTINGS["fast"], RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32)
    )
    kills: list[Kill] = []
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        training = Training(Path(folder))
        try:
            begun = time.monotonic()
            while not training.steps():
                time.sleep(0.2)
                if time.monotonic() - begun > PATIENCE_S:
                    raise SystemExit(
                        "soak: the run did not begin: "
                        + (Path(folder) / "driver.log").read_text()[-2000:]
                    )
            begun = time.monotonic()
            while time.monotonic() - begun < 60 * arguments.minutes:
                time.sleep(random.uniform(least, most))
                what = random.choice(("worker", "worker", "node", "driver"))
                kills.append(suffered(training, what, getattr(training, f"kill_{what}")))
                print(f"{time.monotonic() - begun:6.0f} s  {kills[-1]}", flush=True)
            seconds = time.monotonic() - begun
            training.stop()
            stopped = last(training.journal, "checkpoint")
            assert stopped is not None, "it saved when it was stopped"
            starts = [event for event in read(training.journal) if event["event"] == "start"]
            about = {
                "steps": stopped["step"],
                "batch_size": BATCH,
                "samples": SAMPLES,
                "workers": WORLD,
            }
            faults = wrong(training.steps(), starts, **about)
        finally:
            training.close()
    machine = hardware(device_here())
    print_kills(kills)
    print(
        f"{len(kills)} kills in {seconds / 60:.1f} min, {stopped['step']} steps in the history that"
        " survived",
        end=", ",
    )
    print(
        "; ".join(faults)
        or f"each sample once in each of {stopped['step'] * BATCH // SAMPLES} epochs and the rest"
    )
    print(f"of the time {sum(kill.seconds for kill in kills) / seconds:.0%} went to recovery")
    print(
        f"commit {commit()}, {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}"
    )
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
