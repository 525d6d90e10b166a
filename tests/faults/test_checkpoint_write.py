"""What befalls checkpoints: killed while one is written or uploaded, a full disk, damage; the bits
are the same.
"""

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.core.errors import UserError
from pipeline.launch.driver import Inline
from pipeline.recipe import Checkpointing, Policy
from pipeline.train.checkpoint import checkpoints, read_trainer, step_folders, step_name
from pipeline.train.guards import storage_outage
from pipeline.train.recovery import Decisions
from tests.faults.test_not_finite import hit
from tests.helpers.damage import flip
from tests.helpers.driver import Driver
from tests.helpers.interruptions import before_batch, between_batches, dies_at, newest
from tests.helpers.s3 import s3_server
from tests.helpers.small import (
    Command,
    events,
    make_run,
    same_weights,
    small_recipe,
    steps_of,
    train_inline,
)
from tests.helpers.waiting import until

pytestmark = pytest.mark.timeout(240)

SEED = 20261128  # of the steps and files at which something happens
STEPS = [3, 6, 8, 9, 12, 15, 16]  # of the checkpoints: each third, and each epoch's end
FILES = ["plain/state.pt", "buffers_rank0.pt", "model.safetensors", "trainer.json", "manifest.json"]


def train(job: Any) -> None:
    with Inline() as launcher:
        launcher.run(job, "test")


def go_on(run: Path, untouched: Path, *starts: int) -> None:
    """Train the run again: it has started at these steps, and ends with the bits of the other."""
    train_inline(run, small_recipe())
    assert steps_of(run, "start") == [*starts]
    assert same_weights(run, untouched)


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A run that died after step 6 was saved."""
    with dies_at(7):
        train_inline(tmp_path / "run", small_recipe())
    return tmp_path / "run"


def fail_first(
    patch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    error: Exception,
    *,
    times: int,
    where: Callable[[Any], bool] = lambda first: True,
) -> list[Any]:
    """The first so many calls raise the error, of those whose first argument fits; these come to
    stand in the list that is returned.
    """
    original, failed = getattr(owner, name), []

    def fails(first: Any, *words: Any, **named: Any) -> Any:
        if where(first) and len(failed) < times:
            failed.append(first)
            raise error
        return original(first, *words, **named)

    patch.setattr(owner, name, fails)
    return failed


def fail_writes(patch: pytest.MonkeyPatch, step: int, *, times: int) -> None:
    error, of_step = OSError(errno.EIO, "Input/output error", "x"), step_name(step)
    fail_first(patch, checkpoints, "_write", error, times=times, where=lambda f: of_step in str(f))


KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from pipeline.train.checkpoint import checkpoints
from pipeline.train.checkpoint import CheckpointStore
from pipeline.launch.driver import Inline
from tests.helpers.small import make_run, small_recipe

run, address, step, name, how = sys.argv[1:6]
run = Path(run)
write, seal, put = checkpoints._write, checkpoints.seal, CheckpointStore._put

def die(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    os.kill(os.getpid(), signal.SIGKILL)

def written(file, value):
    write(file, value)
    if f"step_{int(step):08d}/{name}" in str(file):
        die(file)

def sealed(folder, facts):
    seal(folder, facts)
    if f"step_{int(step):08d}" in str(folder) and name == "manifest.json":
        die(folder / name)

def brought(self, file, path):
    if f"step_{int(step):08d}-" in path and path.endswith(f"/{name}"):
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, file, path)

if how == "written":
    checkpoints._write, checkpoints.seal = written, sealed
else:
    CheckpointStore._put = brought
with Inline() as launcher:
    launcher.run(replace(make_run(run, small_recipe()), checkpoints=address), "test")
"""


def killed_at(run: Path, address: str, seed: int, how: str) -> int:
    """The step of the checkpoint at which it was killed."""
    draw = random.Random(SEED + seed)
    step, name = draw.choice(STEPS[1:]), draw.choice(FILES)
    words = [sys.executable, "-c", KILLED, str(run), address, str(step), name, how]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    return step


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in (1, *range(3, 9)))]
)
def test_killed_while_a_checkpoint_is_written(tmp_path: Path, untouched: Path, seed: int) -> None:
    run = tmp_path / "run"
    step = killed_at(run, "", seed, "written")
    assert list((run / "checkpoints").glob(f".writing-*-step_{step:08d}"))
    go_on(run, untouched, 0, newest(step - 1))
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.full
def test_killed_while_a_checkpoint_goes_to_s3_and_gone_on_with_in_a_fresh_folder(
    tmp_path: Path, untouched: Path
) -> None:
    fresh = tmp_path / "fresh"
    with s3_server() as bucket:
        step = killed_at(tmp_path / "run", f"{bucket}/run", 2, "brought")
        train(replace(make_run(fresh, small_recipe()), checkpoints=f"{bucket}/run"))
        assert steps_of(fresh, "start") == [newest(step - 1)]
        (fresh / "job.json").write_text(f'{{"checkpoints": "{bucket}/run"}}')
        assert same_weights(fresh, untouched)


DAMAGES: dict[str, Callable[[Path, str], object]] = {  # of a checkpoint, or of a file in it
    "truncated": lambda at, name: os.truncate(at / name, (at / name).stat().st_size // 2),
    "flipped": lambda at, name: flip(at / name, (at / name).stat().st_size // 3),
    "missing": lambda at, name: shutil.rmtree(at),
    "without its manifest": lambda at, name: (at / "manifest.json").unlink(),
}


@pytest.mark.parametrize(
    "how",
    [
        "flipped",
        "missing",
        *(
            pytest.param(how, marks=pytest.mark.full)
            for how in ("truncated", "without its manifest")
        ),
    ],
)
def test_the_newest_is_damaged(tmp_path: Path, untouched: Path, how: str) -> None:
    run, draw = tmp_path / "run", random.Random(f"{SEED} {how}")
    with dies_at(draw.randrange(STEPS[1], STEPS[-1])):
        train_inline(run, small_recipe())
    older, last = step_folders(run / "checkpoints")[-2:]
    DAMAGES[how](last, draw.choice(FILES))
    go_on(run, untouched, 0, read_trainer(older)["step"])
    assert [last.name in event["path"] for event in events(run, "quarantine")] == [True] * (
        how != "missing"
    )


def test_all_are_damaged_and_the_run_begins_anew(killed: Path, untouched: Path) -> None:
    draw = random.Random(SEED)
    for checkpoint in step_folders(killed / "checkpoints"):
        DAMAGES["flipped"](checkpoint, draw.choice(FILES))
    go_on(killed, untouched, 0, 0)
    assert len(events(killed, "quarantine")) == 2


def test_where_they_were_is_empty_and_nothing_is_trained_before_they_are_back(
    killed: Path, untouched: Path
) -> None:
    away = (killed / "checkpoints").rename(killed.with_name("away"))
    said = (
        f"^checkpoint: {killed}/checkpoints/step_00000006 must exist, because the journal names"
        " it; got no checkpoint: mount or restore its storage, or start a new run under another"
        " --name$"
    )
    for _ in range(2):
        with pytest.raises(UserError, match=said):
            train_inline(killed, small_recipe())
    assert steps_of(killed, "start") == [0] and len(events(killed, "failed")) == 2
    away.rename(killed / "checkpoints")
    go_on(killed, untouched, 0, 6)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoints._write

    def slowly(file: Path, value: Any) -> None:
        time.sleep(0.05)
        write(file, value)

    monkeypatch.setattr(checkpoints, "_write", slowly)


def test_going_back_waits_for_the_checkpoint_that_is_being_written(
    tmp_path: Path, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hit(monkeypatch, {6, 7})
    train_inline(tmp_path / "hit", small_recipe(policy=Policy(max_skips=1)))
    assert [event["to"] for event in events(tmp_path / "hit", "rollback")] == [6]
    assert steps_of(tmp_path / "hit", "start") == [0, 6]


def test_going_back_passes_by_a_checkpoint_that_storage_failed_to_take(
    tmp_path: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, told = tmp_path / "hit", tmp_path / "told"
    with monkeypatch.context() as patch:
        fail_writes(patch, 6, times=1)
        hit(patch, {6})
        train_inline(run, small_recipe(policy=Policy(max_skips=0)))
    [back] = events(run, "rollback")
    assert (steps_of(run, "unwritten"), back["step"], back["to"]) == ([6], 6, 3)
    assert steps_of(run, "start") == [0, 3]
    train_inline(told, small_recipe(policy=Policy(skip=((3, 7),))))
    assert same_weights(run, told) and not same_weights(run, untouched)


@pytest.mark.parametrize(
    ("step", "steps"),
    [
        (3, [4, *STEPS[1:]]),  # the state at hand, at once
        (7, [8, 8, 14, 16]),  # ... and at an epoch's end before the evaluation, and with its score
    ],
)
def test_storage_that_fails_for_a_moment_costs_one_checkpoint_and_no_training(
    tmp_path: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch, step: int, steps: list[int]
) -> None:
    run = tmp_path / "run"
    fail_writes(monkeypatch, step, times=100)
    between_batches(
        monkeypatch,
        lambda trainer: until(trainer.context.checkpoints.failed, within=20),
        step=step + 1,
    )
    train_inline(run, small_recipe(checkpoints=Checkpointing(every=step)))
    said = f"checkpoint after step {step} was not written: Input/output error: x"
    assert [(each["step"], each["error"]) for each in events(run, "unwritten")] == [(step, said)]
    assert (steps_of(run, "start"), steps_of(run, "checkpoint")) == ([0], steps)
    assert same_weights(run, untouched)


@pytest.mark.parametrize("stops", [False, True], ids=["at the end", "at a stop"])
def test_storage_that_fails_for_a_moment_at_the_last_checkpoint_gets_it_once_more(
    tmp_path: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    run, last = tmp_path / "run", 5 if stops else 16
    fail_writes(monkeypatch, last, times=1)
    recipe = small_recipe(checkpoints=Checkpointing(every=0))
    if stops:
        with monkeypatch.context() as patch:
            between_batches(patch, lambda trainer: (trainer.folder / "stop").touch(), step=5)
            assert train_inline(run, recipe) is None
        assert [path.name for path in step_folders(run / "checkpoints")] == [step_name(5)]
        (run / "stop").unlink()
    train_inline(run, recipe)
    assert steps_of(run, "unwritten") == [last]
    assert step_folders(run / "checkpoints")[-1].name == step_name(16)
    assert same_weights(run, untouched)


def test_storage_that_is_away_as_a_run_starts_is_waited_for_by_the_same_attempt(
    tmp_path: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error is no OSError, as botocore has one of its own."""
    run, address = tmp_path / "run", f"memory://away/{tmp_path.name}"
    job = replace(make_run(run, small_recipe()), checkpoints=address)
    (run / "job.json").write_text(f'{{"checkpoints": "{address}"}}')
    with dies_at(7):
        train(job)
    failed = fail_first(
        monkeypatch,
        MemoryFileSystem,
        "ls",
        RuntimeError("Could not connect to the endpoint URL"),
        times=3,
    )
    monkeypatch.setattr(storage_outage, "FIRST_PAUSE_S", 0.01)
    train(job)
    said = "[Errno 5] RuntimeError: Could not connect to the endpoint URL"
    assert [(each["error"], each["attempt"]) for each in events(run, "waiting")] == [(said, 1)]
    assert len(failed) == 3
    assert steps_of(run, "start") == [0, 6] and events(run, "failed") == []
    assert same_weights(run, untouched)


def test_what_a_run_has_written_down_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recipe, name = tmp_path / "run", small_recipe(epochs=1), "decisions.json"
    make_run(run, recipe)
    Decisions(skipped=((2, 3),), micro_batch=4).write(run)
    failed = fail_first(
        monkeypatch,
        Path,
        "read_text",
        OSError(errno.EIO, "Input/output error", str(run / name)),
        times=2,
        where=lambda path: path.name == name,
    )
    monkeypatch.setattr(storage_outage, "FIRST_PAUSE_S", 0.01)
    train_inline(run, recipe)
    [waiting], [start] = events(run, "waiting"), events(run, "start")
    assert waiting["error"] == f"[Errno 5] Input/output error: '{run / name}'" and len(failed) == 2
    assert start["micro_batch"] == 4 and steps_of(run, "skipped") == [2]


def test_whoever_stops_a_run_leaves_a_whole_checkpoint(tmp_path: Path, slow: None) -> None:
    run, recipe = tmp_path / "run", small_recipe(checkpoints=Checkpointing(every=0))
    make_run(run, recipe)
    (run / "stop").touch()
    assert train_inline(run, recipe) is None
    assert [event["event"] for event in events(run)][-2:] == ["checkpoint", "stopped"]
    assert [path.name for path in step_folders(run / "checkpoints")] == [step_name(1)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    (disk := tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.fail(f"a small disk needs root, to mount one: {mounted.stderr}", pytrace=False)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def grow(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


RECIPE = """
from tests.helpers.small import small_recipe

def recipe():
    return small_recipe().override({{"checkpoints.every": {every}}})
"""
NO_SPACE = f"[Errno {errno.ENOSPC}] journal: "


@pytest.mark.usefixtures("own_store")
@pytest.mark.parametrize(
    ("full_of", "room"),
    [
        ("checkpoints", 1.5),
        pytest.param("the run", 2, marks=pytest.mark.full),
        ("what others write", 8),
    ],
)
def test_a_full_disk_is_said_in_a_line_and_with_room_the_run_goes_on(
    tmp_path: Path,
    untouched: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    spiketrain: Command,
    full_of: str,
    room: float,
) -> None:
    """There is room for so many checkpoints. Where the journal lies there too, and others fill the
    disk, it is the first that finds none.
    """
    first = random.Random(f"{SEED} {full_of}").randrange(2, 8)
    every = 0 if full_of == "what others write" else first
    (tmp_path / "recipe.py").write_text(RECIPE.format(every=every))
    files = step_folders(untouched / "checkpoints")[-1].rglob("*")
    size = sum(-(-file.stat().st_size // 4096) * 4096 for file in files)
    runs, words = small_disk, ("launch", str(tmp_path / "recipe.py"), "--name", "full")
    if full_of == "checkpoints":
        runs, words = tmp_path / "runs", (*words, "--checkpoints", str(small_disk))
    run, how = runs / "full", ("--inline", "--runs", str(runs))
    grow(small_disk, int(size * room))
    with monkeypatch.context() as patch:
        if not every:
            # After a later step the journal's last page may hold all that is still to come.
            before_batch(patch, lambda trainer: fill(small_disk), step=9)
        code, _, said = spiketrain(*words, *how)
    assert code == 2
    [line] = said.strip().splitlines()
    by_checkpoint = f"checkpoint: cannot be written after step {min(2 * every, 8)}: "
    # The journal may find the disk full of half a checkpoint, too.
    by_journal = NO_SPACE if full_of != "checkpoints" else by_checkpoint
    assert line.startswith((by_checkpoint, by_journal) if every else by_journal)
    if full_of == "checkpoints":
        place = small_disk / "full"
        assert line == (
            f"{by_checkpoint}No space left on device; the newest complete one is"
            f" {place / step_name(first)}"
        )
        assert {path.name for path in place.iterdir()} == {"owner.json", step_name(first)}
        assert by_checkpoint in events(run, "failed")[0]["error"]
    assert (steps_of(run, "start"), steps_of(run, "checkpoint")) == ([0], [every or 8])
    (small_disk / "ballast").unlink(missing_ok=True)
    grow(small_disk, size * 8)
    code, _, said = spiketrain("resume", "full", *how)
    assert code == 0, said
    assert steps_of(run, "start") == [0, every or 8]
    assert same_weights(run, untouched)


LONG = """
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.recipe.recipe import spec
from tests.helpers.small import small_recipe

def recipe():
    data = spec(Synthetic, samples=8 * 200, val_samples=20, shape=(1, 8, 8))
    return small_recipe(data=data, backend="deepspeed").override({"checkpoints.every": 0})
"""


@pytest.mark.usefixtures("own_store")
@pytest.mark.distributed
@pytest.mark.full
def test_workers_that_a_full_disk_ends_are_not_started_again(
    tmp_path: Path, small_disk: Path
) -> None:
    grow(small_disk, 2**24)
    (tmp_path / "recipe.py").write_text(LONG)
    (small_disk / "full.log").symlink_to(tmp_path / "said")  # what the driver says finds room
    words = ("launch", "recipe.py", "--name", "full", "--workers", "2", "--device", "cpu")
    driver = Driver(*words, run=small_disk / "full", folder=tmp_path)
    try:
        driver.at_step(random.Random(SEED + 2).randrange(5, 30))
        fill(small_disk)
        assert driver.end() == 2
    finally:
        driver.kill()
    line = driver.log.read_text().splitlines()[-1]
    assert line.startswith("worker 0: ") and NO_SPACE in line
    assert line.endswith(f"{str(small_disk / 'full' / 'journal.jsonl')!r}")
    assert steps_of(small_disk / "full", "start") == [0]
