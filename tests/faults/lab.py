"""A recipe whose rule writes down which samples it was given, and the process that drives a run of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from pipeline.track.jsonl import Follower
from tests.nodes import TOKEN

BATCH, STEPS_PER_EPOCH, EPOCHS = 12, 10, 4
LAB = '''
import hashlib, os, time
from pathlib import Path
from pipeline.rules.sltt import SLTT

class Told(SLTT):
    """SLTT that writes down, beside its file, which sample each row of a batch held; slowly, where somebody is to meet it."""

    def objectives(self, model, x_TB, loss_of, *, step, rows):
        pace = Path(__file__).parent / "pace"
        time.sleep(float(pace.read_text()) if pace.exists() else 0.0)
        with (Path(__file__).parent / "rows" / f"{os.getpid()}.txt").open("a") as file:
            for row, x_T in zip(rows, x_TB.unbind(1)):
                sample = hashlib.sha256(x_T.numpy().tobytes()).hexdigest()[:16]
                print(step, row, sample, time.time_ns(), file=file)
        return super().objectives(model, x_TB, loss_of, step=step, rows=rows)
'''
RECIPE = """
from dataclasses import replace
from pipeline.data.synthetic import Synthetic
from pipeline.recipe import spec
from tests.small import small_recipe
from told_lab import Told

def recipe():
    data = spec(Synthetic, samples={samples}, val_samples=20, shape=(1, 8, 8))
    return replace(small_recipe(backend="deepspeed", batch_size={batch}, epochs={epochs}, data=data), rule=spec(Told, k=2))
"""


class Lab:
    """A recipe of its own folder, and what its rule wrote down there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "rows").mkdir(parents=True)
        (folder / "told_lab.py").write_text(LAB)
        text = RECIPE.format(samples=BATCH * STEPS_PER_EPOCH + 5, batch=BATCH, epochs=EPOCHS)
        (folder / "told.py").write_text(text)

    def pace(self, seconds: float) -> None:
        (self.folder / "pace.new").write_text(str(seconds))
        (self.folder / "pace.new").rename(self.folder / "pace")

    def samples(self) -> list[list[str]]:
        """Of each step, by row, as it was done last."""
        newest: dict[tuple[int, int], tuple[int, str]] = {}
        for file in (self.folder / "rows").iterdir():
            for line in file.read_text().splitlines():
                step, row, sample, when = line.split()
                place = (int(step), int(row))
                newest[place] = max(newest.get(place, (0, "")), (int(when), sample))
        return [[newest[step, row][1] for row in range(BATCH)] for step in range(STEPS_PER_EPOCH * EPOCHS)]


class Driven:
    """`spiketrain launch` of a lab, with more words, in a process of its own; `resume`, where its run is there."""

    def __init__(self, lab: Lab, *more: str) -> None:
        self.lab, self.run = lab, lab.folder / "runs" / "run"
        words = ["launch", str(lab.folder / "told.py"), "--name", self.run.name, "--device", "cpu"]
        words = ["resume", self.run.name] if self.run.exists() else words
        words += [*more, "--runs", str(self.run.parent), "--trust", "told_lab"]
        self.log = lab.folder / "log"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline", *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=lab.folder,
                env={**os.environ, **TOKEN},
            )
        self.follower = Follower(self.run / "journal.jsonl", offset=_size(self.run / "journal.jsonl"))

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool], *, within: float = 200.0) -> dict[str, Any]:
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            for event in self.follower.poll():
                if wanted(event):
                    return event
            assert self.process.poll() is None, f"the driver ended:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.01)
        raise AssertionError(f"not seen within {within} s:\n{self.log.read_text()[-3000:]}")

    def start_of(self, workers: int) -> dict[str, Any]:
        start = self.wait_for(lambda event: event["event"] == "start")
        assert start["world_size"] == workers
        return start

    def at_step(self, step: int) -> None:
        self.wait_for(lambda event: event["event"] == "step" and event["step"] >= step)

    def end(self) -> None:
        self.lab.pace(0)
        assert self.process.wait(300) == 0, self.log.read_text()[-3000:]

    def kill(self) -> None:
        """Whatever is left of it."""
        if self.process.poll() is None:
            for each in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                each.kill()
            self.process.wait()


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
