"""Two DeepSpeed workers under Ray meet one fault after another and end with the bits of a run that
was told what to skip.

All of them in one run, as every start of workers costs seconds; a test for each looks at what
became of it. The last fault is the death of the run's driver, and the run is resumed by its name.
"""

import contextlib
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.__main__ import main
from pipeline.recipe.recipe import read_json, write_json
from pipeline.report.stores import open_store
from pipeline.train import worker
from pipeline.train.checkpoint import step_name
from pipeline.train.job import Job, RankInfo
from tests.faults.test_security import holders, plant
from tests.helpers.driver import Driver
from tests.helpers.processes import run_ranks
from tests.helpers.small import events, make_run, recipes_of, same_weights
from tests.helpers.waiting import until

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

SEED = 20261126  # of the steps at which something happens
LAB = '''
import math, os, signal, time
from contextlib import contextmanager
from pathlib import Path
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.rules.sltt import SLTT

HERE = Path(__file__).parent
FAULTS = {faults!r}  # name: (rank, step)
SAVED = {saved!r}  # name: the newest checkpoint by then

def first_time(what):
    try:
        os.close(os.open(HERE / what, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True

def due(name, rank, step):
    return FAULTS[name] == (rank, step)

def strikes(name, rank, step):
    """Once, and not before that checkpoint, which training does not wait for, is whole."""
    if not due(name, rank, step) or (HERE / name).exists():
        return False
    while not (HERE / "runs" / "hit" / "checkpoints" / SAVED[name]).exists():
        time.sleep(0.01)
    return first_time(name)

class Faulty(SLTT):
    """SLTT on a machine that is not well."""

    def loss_terms(self, model, x_TB, loss_of, *, step, rows):
        here = self.world.rank, step
        if due("not finite", *here):
            x_TB = x_TB * math.nan
        for name in ("killed 0", "killed 1"):
            if strikes(name, *here):
                os.kill(os.getpid(), signal.SIGKILL)
        if due("drift", *here) and first_time("drift"):
            next(model.parameters()).data.flatten()[0] += 1e-4
        if strikes("driver", *here):
            time.sleep(1000)  # until whoever sees the file kills the driver, and Ray us
        return super().loss_terms(model, x_TB, loss_of, step=step, rows=rows)

class FaultyData(Synthetic):
    """Synthetic on a disk that is not well."""

    def train(self, *, rank, **sizes):
        return FaultyLoader(super().train(rank=rank, **sizes), rank, sizes["batch_size"])

class FaultyLoader:
    def __init__(self, loader, rank, batch_size):
        self.loader, self.rank, self.batch_size = loader, rank, batch_size
        self.samples, self.steps_per_epoch = loader.samples, loader.steps_per_epoch
        self.close = loader.close

    @contextmanager
    def epoch(self, epoch, *, start=0):
        with self.loader.epoch(epoch, start=start) as batches:
            yield self.met(batches, epoch * self.steps_per_epoch + start // self.batch_size)

    def met(self, batches, step):
        for step, batch in enumerate(batches, step):
            if due("exception", self.rank, step) and first_time("exception"):
                raise RuntimeError("the cable fell out")
            if due("hang", self.rank, step) and first_time("hang"):
                time.sleep(1000)
            yield batch
'''
RECIPE = """
from dataclasses import replace
from pipeline.recipe.recipe import Policy, spec
from pipeline.rules.sltt import SLTT
from tests.helpers.small import small_recipe
from faulty_lab import Faulty, FaultyData

def recipe():
    made = small_recipe(backend="deepspeed", epochs=6)
    often = {{"checkpoints.every": 5, "policy.replicas_every": 5, "evaluation.every": 6}}
    made = made.override(often)
    return replace(made, {change})
"""


CHECKPOINTS = sorted(
    {*range(0, 49, 5), *range(0, 49, 8)}
)  # checkpoints.every, and each epoch's end


def newest(step: int) -> int:
    """The checkpoint that a worker which fails in batch `step` leaves."""
    return max(each for each in CHECKPOINTS if each <= step)


@pytest.fixture(scope="module")
def faults() -> dict[str, tuple[int, int]]:
    """At steps of their own, in order, in the six epochs of eight batches; the driver dies once the
    drift has been found.
    """
    draw = random.Random(SEED)
    names = ("not finite", "exception", "hang", "killed 0", "killed 1", "drift")
    found = {
        name: (draw.randrange(2), 2 + 6 * place + draw.randrange(5))
        for place, name in enumerate(names)
    }
    found["driver"] = (draw.randrange(2), 41 + draw.randrange(5))
    return {**found, **{f"killed {rank}": (rank, found[f"killed {rank}"][1]) for rank in range(2)}}


OPTIONS = (
    *("--workers", "2", "--device", "cpu", "--trust", "faulty_lab"),
    *("--hang-minutes", "0.3", "--max-restarts", "4"),
)


def synced(run: Path) -> str:
    """The run's status in MLflow after `spiketrain sync`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["spiketrain", "sync", run.name, "--runs", str(run.parent)])
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 0
    return in_mlflow(run)


def hunted(file: Path, run: Path) -> list[psutil.Process]:
    """Launch the run, kill its driver where its turn comes, and resume it.

    Returns the workers that outlived the driver by 15 s.
    """
    first = Driver("launch", str(file), *OPTIONS, "--name", run.name, run=run, folder=file.parent)
    try:
        until(
            (file.parent / "driver").exists,
            process=first.process,
            within=400,
            said=first.log.read_text,
        )
        workers = first.workers()
        assert len(workers) == 2
        write_json(file.parent / "doors.json", doors(psutil.Process(first.process.pid)))
        first.process.kill()
        _, left = psutil.wait_procs(
            workers, timeout=15
        )  # sooner than they would take themselves to hang
    finally:
        first.kill()
    assert synced(run) == "KILLED"
    second = Driver("resume", run.name, "--trust", "faulty_lab", run=run, folder=file.parent)
    try:
        assert second.end() == 0, second.log.read_text()[-3000:]
    finally:
        second.kill()
    return left


def in_mlflow(run: Path) -> str:
    [seen] = open_store(os.environ["MLFLOW_TRACKING_URI"]).listed()
    assert seen.name == run.name
    return seen.status


def doors(driver: psutil.Process) -> list[tuple[str, str]]:
    """Where it and all that it has started listen: the process, and the address."""
    found = []
    for each in (driver, *driver.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [
                (each.name(), door.laddr.ip)
                for door in each.net_connections("inet")
                if door.status == psutil.CONN_LISTEN
            ]
    return found


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, faults: dict[str, tuple[int, int]], empty_store: Path
) -> Iterator[tuple[Path, Path]]:
    """The run that met them, and one of two plain processes that was told to skip what it
    skipped.
    """
    folder = tmp_path_factory.mktemp("faults")
    saved = {name: step_name(newest(step)) for name, (_, step) in faults.items()}
    (folder / "faulty_lab.py").write_text(LAB.format(faults=faults, saved=saved))
    step = faults["not finite"][1]
    (folder / "hit.py").write_text(
        RECIPE.format(change="rule=spec(Faulty), data=spec(FaultyData, **made.data.kwargs)")
    )
    (folder / "told.py").write_text(
        RECIPE.format(change=f"rule=spec(SLTT), policy=Policy(skip=(({step}, {step + 1}),))")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        store = shutil.copy(empty_store, folder / "mlflow.db")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
        with tempfile.TemporaryDirectory(
            prefix="ray"
        ) as logs:  # of a short name: sockets lie in it
            patch.setenv("RAY_TMPDIR", logs)
            plant(patch)
            hit = folder / "runs" / "hit"
            assert hunted(folder / "hit.py", hit) == []
            shutil.copytree(
                logs,
                folder / "ray",
                symlinks=True,
                ignore=lambda _, names: [n for n in names if n == "sockets"],
            )
        [recipe] = recipes_of(folder / "told.py")
        told = make_run(folder / "runs" / "told", recipe)
        (folder / "meeting").mkdir()
        run_ranks(_train, 2, folder / "meeting", told)
        yield hit, Path(told.run)


def _train(rank: int, ranks: int, job: Job) -> None:
    worker.run(job, RankInfo(rank, ranks, "cpu", rank))


def test_the_parameters_are_the_same_to_the_bit(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(runs[0].parent.parent)
    assert same_weights(*runs, trust=["faulty_lab"])
    assert len(events(runs[0], "start")) == 7 and len(events(runs[1], "start")) == 1


def test_what_is_not_finite_on_one_worker_is_skipped_by_all(
    runs: tuple[Path, Path], faults: dict[str, tuple[int, int]]
) -> None:
    skipped = {(event["step"], event["reason"]) for event in events(runs[0], "skipped")}
    assert skipped == {(faults["not finite"][1], "its gradient is not finite on 1 of 2 workers")}


def test_an_exception_in_the_loader_of_one_worker_starts_all_again(
    runs: tuple[Path, Path], faults: dict[str, tuple[int, int]]
) -> None:
    start = events(runs[0], "start")[1]
    assert start["step"] == newest(faults["exception"][1])


def test_a_loader_that_hangs_is_written_down_and_its_worker_started_again(
    runs: tuple[Path, Path], faults: dict[str, tuple[int, int]]
) -> None:
    rank, step = faults["hang"]
    assert events(runs[0], "start")[2]["step"] == newest(step)
    files = (runs[0] / "stacks").glob(f"rank{rank}-*")
    stacks = "".join(file.read_text() for file in files)  # one that was killed leaves an empty one
    assert 'faulty_lab.py", line' in stacks and " in met" in stacks
    told = events(runs[0], "hung")
    assert {event["attempt"] for event in told} == {2} and rank in [
        event["worker"] for event in told
    ]
    assert all((runs[0] / event["stacks"]).read_text() for event in told)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_is_killed_in_the_middle_of_a_step(
    runs: tuple[Path, Path], faults: dict[str, tuple[int, int]], rank: int
) -> None:
    assert events(runs[0], "start")[3 + rank]["step"] == newest(faults[f"killed {rank}"][1])
    [died] = [event for event in events(runs[0], "died") if event["attempt"] == 3 + rank]
    assert died["worker"] == rank and "process has died" in died["error"]


def test_a_cluster_of_our_own_listens_to_its_own_machine_alone(runs: tuple[Path, Path]) -> None:
    """Of torch's store and gloo, too, which ask nobody for a token."""
    found = read_json(runs[0].parent.parent / "doors.json")
    assert {"gcs_server", "raylet"} <= {name for name, _ in found} and len(found) > 10
    assert [
        door for door in found if door[1].removeprefix("::ffff:") not in ("127.0.0.1", "::1")
    ] == []


def test_no_secret_of_the_driver_is_written_down_by_anybody(runs: tuple[Path, Path]) -> None:
    folder = runs[0].parent.parent
    logs = [file.name for file in (folder / "ray").rglob("*") if file.is_file()]
    assert "gcs_server.out" in logs and any(name.startswith("worker-") for name in logs)
    assert (folder / "mlflow.db").exists()
    assert holders(folder) == []


def test_weights_that_come_apart_are_found_and_given_up(
    runs: tuple[Path, Path], faults: dict[str, tuple[int, int]]
) -> None:
    [back] = events(runs[0], "rollback")
    step = faults["drift"][1]
    found = min(each for each in CHECKPOINTS if each > step)
    assert (back["step"], back["to"]) == (found - 1, newest(step))
    assert back["reason"].startswith(
        "what workers 1 have learnt is not what others have"
    )  # of two, nobody can tell which
    assert events(runs[0], "start")[5]["step"] == newest(step)


def test_a_driver_that_is_killed_takes_its_workers_along_and_the_run_is_resumed(
    runs: tuple[Path, Path], faults: dict[str, tuple[int, int]]
) -> None:
    """Within 15 s. MLflow hears of the death when the run is synced, see `hunted`."""
    start = events(runs[0], "start")[6]
    assert (start["step"], start["attempt"]) == (newest(faults["driver"][1]), 6)
    assert in_mlflow(runs[0]) == "FINISHED"
