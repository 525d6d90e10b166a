"""What a process fetches is its own until it ends, and a checkpoint is loaded whole: as its
manifest lists it, or not at all.
"""

import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from pipeline.train.checkpoint import Checkpoints, damage, place_at
from pipeline.train.checkpoint.place import sweep_fetched
from tests.helpers.few import TRAINER, Counting, backend, save

pytestmark = pytest.mark.timeout(60)

OTHER = """
import sys
from pathlib import Path
from pipeline.train.checkpoint.place import own_folder

folder = own_folder(Path(sys.argv[1]))
(folder / "file").touch()
print(folder, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    made = Checkpoints(place_at(f"memory://fetched/{uuid.uuid4().hex}", tmp_path), attempt="a")
    save(made, 1, backend(1), Counting(1), TRAINER)
    return made


def test_no_other_process_takes_away_what_one_has_fetched_and_what_a_dead_one_left_is_swept(
    checkpoints: Checkpoints,
) -> None:
    path, staging = checkpoints.newest(), checkpoints.place.staging
    assert path is not None
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, str(staging)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        assert theirs != path.parent and damage(path) is None
        checkpoints.place.sweep()
        assert (theirs / "file").exists() and damage(path) is None
        other.kill()
        other.wait()
    assert (theirs / "file").exists()
    checkpoints.place.sweep()
    assert not theirs.exists() and damage(path) is None
    again = checkpoints.newest()
    assert again == path and len([*staging.iterdir()]) == 2  # this process's, and its lock


def test_a_process_that_ends_leaves_nothing_of_what_it_fetched(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", OTHER, str(tmp_path)],
        input="",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.stdout and [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", ["rule.pt", "rng_rank0.pt", "plain/state.pt", "model.safetensors"])
def test_a_file_that_is_gone_since_it_was_verified_is_an_error_and_nothing_is_loaded(
    checkpoints: Checkpoints, name: str
) -> None:
    path, made, rule = checkpoints.newest(), backend(2), Counting()
    assert path is not None
    before = [p.clone() for p in made.network.parameters()]
    (path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        checkpoints.load(path, made, rule)
    assert rule.feedback.tolist() == [0.0] * 3  # type: ignore[operator]
    assert all(a.equal(b) for a, b in zip(before, made.network.parameters(), strict=True))


def test_a_folder_that_cannot_be_deleted_keeps_its_lock_by_which_the_next_sweep_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, folder = tmp_path / ".fetched-a.lock", tmp_path / ".fetched-a"
    lock.touch()
    folder.mkdir()
    with monkeypatch.context() as refusing:
        refusing.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
        sweep_fetched(tmp_path)
    assert lock.exists() and folder.exists()
    sweep_fetched(tmp_path)
    assert not lock.exists() and not folder.exists()
