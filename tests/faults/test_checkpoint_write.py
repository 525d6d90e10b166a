"""What befalls checkpoints: killed while one is written or uploaded, a full disk, damage; the bits
are the same.
"""

import contextlib
import errno
import random
import re
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
from pipeline.launch.in_process import Inline
from pipeline.recipe import Checkpointing, Policy
from pipeline.train.checkpoint import background, step_folders, step_name
from pipeline.train.guards import storage
from pipeline.train.recovery import Decisions
from tests.faults.test_not_finite import hit
from tests.helpers.driver import Driver
from tests.helpers.interruptions import before_batch, between_batches, dies_at
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
STEPS = [
    3,
    6,
    8,
    9,
    12,
    15,
    16,
]  # of the checkpoints: checkpoints.every, and each epoch's end
FILES = ["plain/state.pt", "rng_rank0.pt", "model.safetensors", "trainer.json", "manifest.json"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train_inline(run, small_recipe())
    return run


def saved(run: Path) -> list[str]:
    return [path.name for path in step_folders(run / "checkpoints")]


def fail_writes(patch: pytest.MonkeyPatch, step: int, *, times: int) -> None:
    """Storage fails to take the first so many files of the checkpoint of this step."""
    write, failed = background._write, []

    def fails(file: Path, value: Any) -> None:
        if step_name(step) in str(file) and len(failed) < times:
            failed.append(file)
            raise OSError(errno.EIO, "Input/output error", "x")
        write(file, value)

    patch.setattr(background, "_write", fails)


KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from pipeline.train.checkpoint import background
from pipeline.train.checkpoint import Place
from pipeline.launch.in_process import Inline
from tests.helpers.small import make_run, small_recipe

run, address, step, name, how = sys.argv[1:6]
run = Path(run)
write, seal, put = background._write, background.seal, Place._put

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
    background._write, background.seal = written, sealed
else:
    Place._put = brought
with Inline() as launcher:
    launcher.run(replace(make_run(run, small_recipe()), checkpoints=address), "test")
"""


def killed_at(run: Path, address: str, step: int, name: str, how: str) -> None:
    words = [str(run), address, str(step), name, how]
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, *words], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def before(step: int) -> int:
    return max((each for each in STEPS if each < step), default=0)


def drawn(seed: int) -> tuple[int, str]:
    draw = random.Random(SEED + seed)
    return draw.choice(STEPS[1:]), draw.choice(FILES)


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(3, 9))]
)
def test_killed_while_a_checkpoint_is_written(tmp_path: Path, whole: Path, seed: int) -> None:
    run, (step, name) = tmp_path / "run", drawn(seed)
    killed_at(run, "", step, name, "written")
    assert list((run / "checkpoints").glob(f".writing-*-step_{step:08d}"))
    train_inline(run, small_recipe())
    assert steps_of(run, "start") == [0, before(step)]
    assert same_weights(run, whole)
    assert not list((run / "checkpoints").glob(".*"))


def test_killed_while_a_checkpoint_goes_to_s3_and_gone_on_with_in_a_fresh_folder(
    tmp_path: Path, whole: Path
) -> None:
    step, name = drawn(2)
    with s3_server() as bucket:
        killed_at(tmp_path / "run", f"{bucket}/run", step, name, "brought")
        job = replace(make_run(tmp_path / "fresh", small_recipe()), checkpoints=f"{bucket}/run")
        with Inline() as launcher:
            launcher.run(job, "test")
        assert steps_of(tmp_path / "fresh", "start") == [before(step)]
        (tmp_path / "fresh" / "job.json").write_text(f'{{"checkpoints": "{job.checkpoints}"}}')
        assert same_weights(tmp_path / "fresh", whole)


def truncated(checkpoint: Path, name: str) -> None:
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: len(content) // 2])


def flipped(checkpoint: Path, name: str) -> None:
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 3] ^= 4
    (checkpoint / name).write_bytes(content)


def missing(checkpoint: Path, name: str) -> None:
    shutil.rmtree(checkpoint)


def without_manifest(checkpoint: Path, name: str) -> None:
    (checkpoint / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [truncated, flipped, missing, without_manifest])
def test_the_newest_is_damaged(
    tmp_path: Path, whole: Path, damage: Callable[[Path, str], None]
) -> None:
    run, draw = tmp_path / "run", random.Random(f"{SEED} {damage.__name__}")
    with dies_at(draw.randrange(STEPS[1], STEPS[-1])):
        train_inline(run, small_recipe())
    older, newest = step_folders(run / "checkpoints")[-2:]
    damage(newest, draw.choice(FILES))
    train_inline(run, small_recipe())
    assert step_name(steps_of(run, "start")[-1]) == older.name
    assert [newest.name in event["path"] for event in events(run, "quarantine")] == [True] * (
        damage is not missing
    )
    assert same_weights(run, whole)


def test_all_are_damaged_and_the_run_begins_anew(tmp_path: Path, whole: Path) -> None:
    run, draw = tmp_path / "run", random.Random(SEED)
    with dies_at(7):
        train_inline(run, small_recipe())
    for checkpoint in step_folders(run / "checkpoints"):
        flipped(checkpoint, draw.choice(FILES))
    train_inline(run, small_recipe())
    assert steps_of(run, "start") == [0, 0] and len(events(run, "quarantine")) == 2
    assert same_weights(run, whole)


def test_where_they_were_is_empty_and_nothing_is_trained_before_they_are_back(
    tmp_path: Path, whole: Path
) -> None:
    run = tmp_path / "run"
    with dies_at(7):
        train_inline(run, small_recipe())
    away = (run / "checkpoints").rename(tmp_path / "away")
    for _ in range(2):
        with pytest.raises(UserError) as refusal:
            train_inline(run, small_recipe())
        assert (
            str(refusal.value)
            == f"checkpoint: {run}/checkpoints/step_00000006 must be there, as the journal says;"
            " got no checkpoint: mount or restore its storage, or begin anew under another"
            " --name"
        )
    assert steps_of(run, "start") == [0] and len(events(run, "failed")) == 2
    away.rename(run / "checkpoints")
    train_inline(run, small_recipe())
    assert steps_of(run, "start") == [0, 6]
    assert same_weights(run, whole)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint takes longer to write than several batches to train on."""
    write = background._write

    def slowly(file: Path, value: Any) -> None:
        time.sleep(0.05)
        write(file, value)

    monkeypatch.setattr(background, "_write", slowly)


def test_going_back_waits_for_the_checkpoint_that_is_being_written(
    tmp_path: Path, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hit(monkeypatch, {6, 7})
    train_inline(tmp_path / "hit", small_recipe(policy=Policy(max_skips=1)))
    assert [event["to"] for event in events(tmp_path / "hit", "rollback")] == [6]
    assert steps_of(tmp_path / "hit", "start") == [0, 6]


def test_going_back_passes_by_a_checkpoint_that_storage_failed_to_take(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that is written down is the one that training goes on from, and batches are passed
    over from there.
    """
    with monkeypatch.context() as patch:
        fail_writes(patch, 6, times=1)
        hit(patch, {6})
        train_inline(tmp_path / "hit", small_recipe(policy=Policy(max_skips=0)))
    assert steps_of(tmp_path / "hit", "unwritten") == [6]
    [back] = events(tmp_path / "hit", "rollback")
    assert (back["step"], back["to"]) == (6, 3)
    assert steps_of(tmp_path / "hit", "start") == [0, 3]
    train_inline(tmp_path / "told", small_recipe(policy=Policy(skip=((3, 7),))))
    assert same_weights(tmp_path / "hit", tmp_path / "told") and not same_weights(
        tmp_path / "hit", whole
    )


@pytest.mark.parametrize(
    ("step", "steps"),
    [
        (3, [4, *STEPS[1:]]),  # the state at hand, at once
        (7, [8, 8, 14, 16]),  # ... and at an epoch's end before the evaluation, and with its score
    ],
)
def test_storage_that_fails_for_a_moment_costs_one_checkpoint_and_no_training(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, step: int, steps: list[int]
) -> None:
    fail_writes(monkeypatch, step, times=100)
    between_batches(
        monkeypatch,
        lambda trainer: until(trainer.context.checkpoints.failed, within=20),
        step=step + 1,
    )
    train_inline(tmp_path / "run", small_recipe(checkpoints=Checkpointing(every=step)))
    [event] = events(tmp_path / "run", "unwritten")
    assert (event["step"], event["error"]) == (
        step,
        f"checkpoint after step {step} was not written: Input/output error: x",
    )
    assert steps_of(tmp_path / "run", "start") == [0]
    assert steps_of(tmp_path / "run", "checkpoint") == steps
    assert same_weights(tmp_path / "run", whole)


@pytest.mark.parametrize("stops", [False, True], ids=["at the end", "at a stop"])
def test_storage_that_fails_for_a_moment_at_the_last_checkpoint_gets_it_once_more(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    run, last = tmp_path / "run", 5 if stops else 16
    fail_writes(monkeypatch, last, times=1)
    recipe = small_recipe(checkpoints=Checkpointing(every=0))
    if stops:
        with monkeypatch.context() as patch:
            between_batches(patch, lambda trainer: (trainer.folder / "stop").touch(), step=5)
            assert train_inline(run, recipe) is None
        assert saved(run) == [step_name(5)]
        (run / "stop").unlink()
    train_inline(run, recipe)
    assert steps_of(run, "unwritten") == [last] and saved(run)[-1] == step_name(16)
    assert same_weights(run, whole)


class ServerDown(Exception):
    """As botocore has one of its own, which is no OSError."""


def test_storage_that_is_away_as_a_run_starts_is_waited_for_by_the_same_attempt(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, address = tmp_path / "run", f"memory://away/{tmp_path.name}"
    job = replace(make_run(run, small_recipe()), checkpoints=address)
    (run / "job.json").write_text(f'{{"checkpoints": "{address}"}}')
    with dies_at(7), Inline() as launcher:
        launcher.run(job, "test")
    ls, failed = MemoryFileSystem.ls, []

    def down(self: MemoryFileSystem, *path: Any, **how: Any) -> Any:
        if len(failed) < 3:
            failed.append(path)
            raise ServerDown("Could not connect to the endpoint URL")
        return ls(self, *path, **how)

    monkeypatch.setattr(MemoryFileSystem, "ls", down)
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.01)
    with Inline() as launcher:
        launcher.run(job, "test")
    [waiting] = events(run, "waiting")
    assert (
        waiting["error"] == "[Errno 5] ServerDown: Could not connect to the endpoint URL"
        and len(failed) == 3
    )
    assert waiting["attempt"] == 1
    assert steps_of(run, "start") == [0, 6] and events(run, "failed") == []
    assert same_weights(run, whole)


@pytest.mark.parametrize("name", ["skipped.json", "micro_batch.json"])
def test_what_a_run_has_written_down_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """By the same attempt: a note that storage does not give is not damaged."""
    run, recipe = tmp_path / "run", small_recipe(epochs=1)
    make_run(run, recipe)
    Decisions(skipped=((2, 3),)).write(run)
    (run / "micro_batch.json").write_text("4")
    read_text, failed = Path.read_text, []

    def fails(self: Path, *words: Any, **how: Any) -> str:
        if self.name == name and len(failed) < 2:
            failed.append(self)
            raise OSError(errno.EIO, "Input/output error", str(self))
        return read_text(self, *words, **how)

    monkeypatch.setattr(Path, "read_text", fails)
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.01)
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
    assert saved(run) == [step_name(1)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 kB, to be grown."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.fail(
            f"a small disk needs root, to mount one: {mounted.stderr.strip()}", pytrace=False
        )
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def grow(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def size_of(checkpoint: Path, *, page: int = 1) -> int:
    """Bytes of its files, in whole pages."""
    return sum(-(-file.stat().st_size // page) * page for file in checkpoint.rglob("*"))


RECIPE = """
from tests.helpers.small import small_recipe

def recipe():
    return small_recipe().override({{"checkpoints.every": {every}}})
"""


@pytest.mark.usefixtures("own_store")
def test_a_full_disk_is_said_in_a_line_and_with_room_the_run_goes_on(
    tmp_path: Path,
    whole: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    spiketrain: Command,
) -> None:
    first = random.Random(SEED).randrange(2, 8)
    second = min(2 * first, 8)  # or the epoch's end
    (tmp_path / "recipe.py").write_text(RECIPE.format(every=first))
    one = size_of(step_folders(whole / "checkpoints")[-1], page=4096)
    grow(small_disk, one * 3 // 2)
    runs, place = ("--runs", str(tmp_path / "runs")), small_disk / "full"
    words = (str(tmp_path / "recipe.py"), "--inline", "--name", "full")
    code, _, said = spiketrain("launch", *words, "--checkpoints", str(small_disk), *runs)
    assert code == 2
    [line] = said.strip().splitlines()
    wanted = f"checkpoint: cannot be written after step {second}: No space left on device"
    assert line.startswith(wanted) and line.endswith(
        f"the newest whole one is {place / step_name(first)}"
    )
    assert {path.name for path in place.iterdir()} == {"owner.json", step_name(first)}
    assert re.search(wanted, events(tmp_path / "runs" / "full", "failed")[0]["error"])
    grow(small_disk, one * 8)
    code, _, said = spiketrain("resume", "full", "--inline", *runs)
    assert code == 0, said
    assert steps_of(tmp_path / "runs" / "full", "start") == [0, first]
    assert same_weights(tmp_path / "runs" / "full", whole)


BALLAST = "ballast"


def fill(disk: Path) -> None:
    """Somebody else fills the disk to its last byte."""
    with (disk / BALLAST).open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


@pytest.mark.usefixtures("own_store")
@pytest.mark.parametrize("filled", ["by a checkpoint", "by others"])
def test_a_full_disk_that_holds_the_whole_run_costs_no_bit(
    tmp_path: Path,
    whole: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    spiketrain: Command,
    filled: str,
) -> None:
    """The journal lies on it, too: with others on the disk it is the first that finds no room."""
    every = random.Random(SEED + 1).randrange(2, 8) if filled == "by a checkpoint" else 0
    (tmp_path / "recipe.py").write_text(RECIPE.format(every=every))
    size = size_of(step_folders(whole / "checkpoints")[-1])
    grow(small_disk, size * 2 if every else size * 8)
    words, folder = ("--inline", "--runs", str(small_disk)), small_disk / "full"
    with monkeypatch.context() as patch:
        if not every:
            # After a later step the journal's last page may hold all that is still to come.
            before_batch(patch, lambda trainer: fill(small_disk), step=9)
        code, _, said = spiketrain("launch", str(tmp_path / "recipe.py"), "--name", "full", *words)
    assert code == 2
    [line] = said.strip().splitlines()
    by_journal = (  # which may find the disk full of half a checkpoint, too
        f"[Errno {errno.ENOSPC}] journal: "
    )
    by_checkpoint = f"checkpoint: cannot be written after step {min(2 * every, 8)}: "
    assert line.startswith((by_checkpoint, by_journal) if every else by_journal)
    [newest] = steps_of(folder, "checkpoint")
    assert steps_of(folder, "start") == [0] and newest == (every or 8)
    (small_disk / BALLAST).unlink(missing_ok=True)
    grow(small_disk, size * 8)
    code, _, said = spiketrain("resume", "full", *words)
    assert code == 0, said
    assert steps_of(folder, "start") == [0, newest]
    assert same_weights(folder, whole)


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
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal is the first that finds no room, in the middle of the first of two long
    epochs.
    """
    grow(small_disk, 2**24)
    (tmp_path / "recipe.py").write_text(LONG)
    (small_disk / "full.log").symlink_to(tmp_path / "said")  # what the driver says finds room
    words = ("launch", str(tmp_path / "recipe.py"), "--name", "full")
    where = ("--workers", "2", "--device", "cpu")
    driver = Driver(*words, *where, run=small_disk / "full", folder=tmp_path)
    try:
        driver.at_step(random.Random(SEED + 2).randrange(5, 30))
        fill(small_disk)
        assert driver.end() == 2
    finally:
        driver.kill()
    line = driver.log.read_text().splitlines()[-1]
    assert line.startswith("worker 0: ") and f"[Errno {errno.ENOSPC}] journal: " in line
    assert line.endswith(f"{str(small_disk / 'full' / 'journal.jsonl')!r}")
    assert steps_of(small_disk / "full", "start") == [0]
