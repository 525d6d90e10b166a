"""A recipe whose rule writes down which samples it was given, and the process that drives a run of
it.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from benchmarks.survived import survived
from pipeline.train.weights import load_run
from tests.helpers.driver import Driver
from tests.helpers.nodes import TOKEN
from tests.helpers.small import events

BATCH, STEPS_PER_EPOCH, EPOCHS = 12, 10, 4
LAB = '''
import hashlib, os, time
from pathlib import Path
from pipeline.rules.sltt import SLTT

class Told(SLTT):
    """SLTT that notes beside its file which sample each row of a batch held; slowly on request."""

    def loss_terms(self, model, x_TB, loss_fn, *, step, rows):
        pace = Path(__file__).parent / "pace"
        time.sleep(float(pace.read_text()) if pace.exists() else 0.0)
        with (Path(__file__).parent / "rows" / f"{os.getpid()}.txt").open("a") as file:
            for row, x_T in zip(rows, x_TB.unbind(1)):
                sample = hashlib.sha256(x_T.numpy().tobytes()).hexdigest()[:16]
                print(step, row, sample, time.time_ns(), file=file)
        return super().loss_terms(model, x_TB, loss_fn, step=step, rows=rows)
'''
RECIPE = """
from dataclasses import replace
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.recipe.recipe import spec
from tests.helpers.small import small_recipe
from told_lab import Told

def recipe():
    data = spec(Synthetic, samples={samples}, val_samples=20, shape=(1, 8, 8))
    made = small_recipe(backend="deepspeed", batch_size={batch}, epochs={epochs}, data=data)
    return replace(made, rule=spec(Told, k=2))
"""


def samples_of(run: Path, files: Iterable[Path], *, steps: int, batch: int) -> list[list[str]]:
    """Of each step of the history that survived, by row. No attempt has trained a row twice.

    A line of a file is the step, the row, the sample and the time in ns.
    """
    lines = [line.split() for file in files for line in file.read_text().splitlines()]
    told = [
        {"step": int(step), "row": int(row), "sample": sample, "time": int(when) / 1e9}
        for step, row, sample, when in lines
    ]
    kept = survived(told, events(run, "start"))
    found = {(each["step"], each["row"]): each["sample"] for each in kept}
    assert len(found) == len(kept) == steps * batch
    return [[found[step, row] for row in range(batch)] for step in range(steps)]


def assert_trained_as(
    untouched: Path,
    run: Path,
    samples: list[list[str]],
    expected: list[list[str]],
    *,
    steps_per_epoch: int,
    trust: Sequence[str] = (),
) -> None:
    """Every sample of an epoch once, in the rows where it belongs, and the weights but for the
    order of sums.
    """
    for first in range(0, len(samples), steps_per_epoch):
        seen = [*chain(*samples[first : first + steps_per_epoch])]
        assert len(set(seen)) == len(seen)
    assert samples == expected
    ours, theirs = (load_run(each, trust=trust).state_dict() for each in (run, untouched))
    assert ours.keys() == theirs.keys() and len(ours) > 5
    for name, value in theirs.items():
        assert torch.linalg.norm(value - ours[name]) <= 1e-5 * torch.linalg.norm(value), name


class Lab:
    """A recipe of its own folder, and what its rule wrote down there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "runs" / "run"
        (folder / "rows").mkdir(parents=True)
        (folder / "told_lab.py").write_text(LAB)
        text = RECIPE.format(samples=BATCH * STEPS_PER_EPOCH + 5, batch=BATCH, epochs=EPOCHS)
        (folder / "told.py").write_text(text)

    def pace(self, seconds: float) -> None:
        (self.folder / "pace.new").write_text(str(seconds))
        (self.folder / "pace.new").rename(self.folder / "pace")

    def samples(self) -> list[list[str]]:
        files = [*(self.folder / "rows").iterdir()]
        return samples_of(self.run, files, steps=STEPS_PER_EPOCH * EPOCHS, batch=BATCH)


class Driven(Driver):
    """`spiketrain launch` of a lab, with more words; `resume`, where its run is there."""

    def __init__(self, lab: Lab, *more: str, terminal: int | None = None) -> None:
        self.lab, run = lab, lab.run
        words = ["launch", str(lab.folder / "told.py"), "--name", run.name, "--device", "cpu"]
        words = ["resume", run.name] if run.exists() else words
        words = [*words, *more, "--trust", "told_lab"]
        super().__init__(*words, run=run, folder=lab.folder, environment=TOKEN, terminal=terminal)

    def start_of(self, workers: int) -> dict[str, Any]:
        start = self.wait_for(lambda event: event["event"] == "start")
        assert start["world_size"] == workers
        return start

    def finish(self) -> None:
        self.lab.pace(0)
        assert self.end() == 0, self.log.read_text()[-3000:]
