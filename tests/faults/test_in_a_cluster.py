"""Two DeepSpeed workers under Ray meet one fault after another and end with the bits of a run that was told what to skip.

All of them in one run, as every start of workers costs seconds; a test for each looks at what became of it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main
from pipeline.track.jsonl import read
from tests.small import same_weights

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

SEED = 20261126  # of the steps at which something happens
LAB = '''
import math, os, time
from pathlib import Path
from pipeline.rules.sltt import SLTT

HERE = Path(__file__).parent

def first_time(what):
    try:
        os.close(os.open(HERE / what, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True

class Faulty(SLTT):
    """SLTT on a machine that is not well: {{name: (rank, step)}}."""

    faults = {faults!r}

    def objectives(self, model, x_TB, loss_of, *, step, rows):
        here = [name for name, at in self.faults.items() if at == (self.world.rank, step)]
        if "not finite" in here:
            x_TB = x_TB * math.nan
        if "exception" in here and first_time("exception"):
            raise RuntimeError("the cable fell out")
        if "hang" in here and first_time("hang"):
            time.sleep(1000)
        if "drift" in here and first_time("drift"):
            next(model.parameters()).data.flatten()[0] += 1e-4
        return super().objectives(model, x_TB, loss_of, step=step, rows=rows)
'''
RECIPE = """
from dataclasses import replace
from pipeline.recipe import spec
from pipeline.rules.sltt import SLTT
from tests.small import small_recipe
from faulty_lab import Faulty

def recipe():
    made = small_recipe(backend="deepspeed", epochs=5, checkpoint_every=5, replicas_every=5, evaluate_every=5)
    return replace(made, {change})
"""


CHECKPOINTS = sorted({*range(0, 41, 5), *range(0, 41, 8)})  # checkpoint_every, and each epoch's end


def newest(step: int) -> int:
    """The checkpoint that a worker which fails in batch `step` leaves."""
    return max(each for each in CHECKPOINTS if each <= step)


@pytest.fixture(scope="module")
def faults() -> dict[str, tuple[int, int]]:
    """At steps of their own, in order, in the five epochs of eight batches."""
    draw = random.Random(SEED)
    names = ("not finite", "exception", "hang", "drift")
    return {name: (draw.randrange(2), 2 + 9 * place + draw.randrange(6)) for place, name in enumerate(names)}


def launched(file: Path, runs: Path) -> Path:
    words = ["launch", str(file), "--workers", "2", "--device", "cpu", "--runs", str(runs), "--name", file.stem]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["spiketrain", *words, "--trust", "faulty_lab", "--hang-minutes", "0.15"])
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 0
    return runs / file.stem


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, faults: dict[str, tuple[int, int]]) -> Iterator[tuple[Path, Path]]:
    """The run that met them, and the one that was told to skip what it skipped."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "faulty_lab.py").write_text(LAB.format(faults=faults))
    step = faults["not finite"][1]
    (folder / "hit.py").write_text(RECIPE.format(change="rule=spec(Faulty)"))
    (folder / "told.py").write_text(RECIPE.format(change=f"rule=spec(SLTT), skip=(({step}, {step + 1}),)"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        yield launched(folder / "hit.py", folder / "runs"), launched(folder / "told.py", folder / "runs")


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read(run / "journal.jsonl") if event["event"] == kind]


def test_the_parameters_are_the_same_to_the_bit(runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(runs[0].parent.parent)
    assert same_weights(*runs, trust=["faulty_lab"])
    assert len(events(runs[0], "start")) == 4 and len(events(runs[1], "start")) == 1


def test_what_is_not_finite_on_one_worker_is_skipped_by_all(runs: tuple[Path, Path], faults: dict[str, tuple[int, int]]) -> None:
    skipped = {(event["step"], event["reason"]) for event in events(runs[0], "skipped")}
    assert skipped == {(faults["not finite"][1], "its gradient is not finite on 1 of 2 workers")}


def test_an_exception_on_one_worker_starts_all_again(runs: tuple[Path, Path], faults: dict[str, tuple[int, int]]) -> None:
    start = events(runs[0], "start")[1]
    assert start["step"] == newest(faults["exception"][1])


def test_a_worker_that_hangs_writes_down_where_and_is_started_again(
    runs: tuple[Path, Path], faults: dict[str, tuple[int, int]]
) -> None:
    rank, step = faults["hang"]
    assert events(runs[0], "start")[2]["step"] == newest(step)
    stacks = {file.name[:5]: file.read_text() for file in (runs[0] / "stacks").iterdir()}
    assert "faulty_lab.py" in stacks[f"rank{rank}"]


def test_weights_that_come_apart_are_found_and_given_up(runs: tuple[Path, Path], faults: dict[str, tuple[int, int]]) -> None:
    [back] = events(runs[0], "rollback")
    step = faults["drift"][1]
    found = min(each for each in CHECKPOINTS if each > step)
    assert (back["step"], back["to"]) == (found - 1, newest(step))
    assert back["reason"].startswith("the weights of workers 1 are")  # of two, nobody can tell which
    assert events(runs[0], "start")[3]["step"] == newest(step)
