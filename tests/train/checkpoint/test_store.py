"""Checkpoints at an address of fsspec's, in memory and in S3 (moto's server): whole or not there,
verified, pruned, swept.
"""

import errno
import hashlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial, partialmethod
from pathlib import Path
from unittest.mock import Mock

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from pipeline.core.errors import UserError
from pipeline.train.checkpoint import (
    CheckpointError,
    Checkpoints,
    CheckpointStore,
    find_damage,
    prune,
    store_at,
    verified_checkpoint,
)
from tests.helpers.few import FILES, TRAINER, Counting, backend, feedback, restore, save

pytestmark = pytest.mark.timeout(120)


def store(address: str, run: Path) -> CheckpointStore:
    place = store_at(address, run)
    assert place.folder is None
    return place


def checkpoints_at(address: str, run: Path, **more: object) -> Checkpoints:
    return Checkpoints(store(address, run), attempt="a", **more)  # type: ignore[arg-type]


def paths(address: str) -> set[str]:
    """Of all that lies there, below the address."""
    fs, root = fsspec.url_to_fs(address, use_listings_cache=False, skip_instance_cache=True)
    return {path.removeprefix(root).strip("/") for path in fs.find(root)}


lost = Mock(side_effect=OSError(errno.ECONNRESET, "Connection reset by peer"))
denied = Mock(side_effect=PermissionError("Access Denied"))  # as s3fs says it, without a number


def cut_at(patch: pytest.MonkeyPatch, name: str) -> None:
    """The connection is lost before a file of this name is put."""
    put = CheckpointStore._put
    patch.setattr(
        CheckpointStore,
        "_put",
        lambda self, file, path: (lost if path.endswith(f"/{name}") else put)(self, file, path),
    )


def test_an_upload_that_was_cut_short_is_no_checkpoint_and_is_swept(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = checkpoints_at(address, tmp_path)
    save(saving, 1, backend(), Counting(), TRAINER)
    with monkeypatch.context() as patch:
        cut_at(patch, "manifest.json")
        saving.save(2, backend(), Counting(), TRAINER)
        with pytest.raises(
            OSError, match="checkpoint after step 2 was not written: Connection reset by peer"
        ):
            saving.wait()
    assert "step_00000002-a/model.safetensors" in paths(address)
    assert store(address, tmp_path).names() == ["step_00000001"]
    assert restore(checkpoints_at(address, tmp_path / "fresh"), backend(), Counting())["step"] == 1
    assert not any("step_00000002" in path for path in paths(address))


@pytest.mark.parametrize(
    ("how", "at"),
    [
        *(("put", name) for name in sorted(FILES)),
        ("removed", "buffers_rank0.pt"),
        ("put", "nowhere"),
    ],
)
def test_a_step_that_is_saved_again_leaves_the_old_or_the_new_wherever_it_is_cut(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, how: str
) -> None:
    saving = checkpoints_at(address, tmp_path, keep=1)
    save(saving, 1, backend(1), Counting(1), TRAINER)
    save(saving, 2, backend(2), Counting(2), TRAINER)
    fs = saving.store.fs

    def remove(path: str, recursive: bool = False) -> None:
        for found in fs.find(path):
            (lost if found.endswith(f"/{at}") else fs.rm_file)(found)

    with monkeypatch.context() as patch:
        if how == "put":
            cut_at(patch, at)
        else:
            patch.setattr(fs, "rm", remove)
        saving.save(2, backend(3), Counting(3), {**TRAINER, "score": 0.5})
        is_new = how == "removed" or at == "nowhere"
        with nullcontext() if is_new else pytest.raises(OSError, match="Connection reset by peer"):
            told = saving.wait()
            assert told is not None and ("Connection reset by peer" in told.prune_error) == (
                how == "removed"
            )
    assert store(address, tmp_path).names() == ["step_00000002"]
    fresh = checkpoints_at(address, tmp_path / "fresh", keep=1)
    assert feedback(fresh.store) == (3 if is_new else 2)
    assert restore(fresh, backend(), Counting())["score"] == (0.5 if is_new else None)
    folders = {path.split("/")[0] for path in paths(address)}
    assert folders == {
        "step_00000002.1-a" if is_new else "step_00000002-a"
    }  # nothing is left of the other


def test_one_of_which_only_the_manifest_is_there_can_be_deleted(
    address: str, tmp_path: Path
) -> None:
    """As a writer leaves it that was taken over before it wrote that."""
    place = store(address, tmp_path)
    place.fs.pipe_file(f"{place.root}/step_00000001-a/manifest.json", b"{}")
    assert place.names() == ["step_00000001"]
    place.delete("step_00000001")
    assert place.names() == [] and paths(address) == set()


def test_a_bucket_that_lets_nobody_delete_takes_new_ones_all_the_same(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = store(address, tmp_path)
    saving = Checkpoints(place, attempt="a", keep=1)
    save(saving, 1, backend(), Counting(), TRAINER)
    monkeypatch.setattr(place.fs, "rm_file", denied)
    monkeypatch.setattr(place.fs, "rm", denied)
    told = [
        save(saving, step, backend(), Counting(float(index)), TRAINER)
        for index, step in enumerate((1, 2, 2))
    ]
    assert [each.prune_error for each in told] == ["PermissionError: Access Denied"] * 3
    assert feedback(store(address, tmp_path / "fresh")) == 2


def test_a_request_that_failed_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a store whose `exists` is fsspec's own, which says no of any failure."""
    address, lost = f"memory://away/{uuid.uuid4().hex}", list[str]()
    originals = {name: getattr(MemoryFileSystem, name) for name in ("info", "cat_file")}
    saving = checkpoints_at(address, tmp_path)
    for step, score in ((1, 0.9), (2, 0.1)):
        save(saving, step, backend(), Counting(), {**TRAINER, "score": score})
    place = store(address, tmp_path)
    place.fs.pipe_file(f"{place.root}/step_00000002.pinned", b"")
    save(saving, 3, backend(), Counting(), {**TRAINER, "score": 0.2})
    there = paths(address)

    def fails(name: str, self: MemoryFileSystem, path: str, **how: object) -> object:
        if path.removeprefix(f"{place.root}/") in lost:
            lost.clear()
            raise RuntimeError("Socket is closed")
        return originals[name](self, path, **how)

    monkeypatch.setattr(MemoryFileSystem, "exists", AbstractFileSystem.exists)
    for name in originals:
        monkeypatch.setattr(MemoryFileSystem, name, partialmethod(partial(fails, name)))
    for file, ask in (
        ("step_00000001-a/manifest.json", place.sweep),
        ("step_00000003-a/manifest.json", lambda: verified_checkpoint(place)),
        ("step_00000003-a/manifest.json", lambda: place.finish(tmp_path / "temp", "step_00000003")),
        ("step_00000002.pinned", lambda: prune(place, "step_00000003", keep=1)),
    ):
        lost.append(file)
        with pytest.raises(OSError, match="Socket is closed"):
            ask()
        assert paths(address) == there and not lost
    place.sweep()
    prune(place, "step_00000003", keep=1)
    assert paths(address) == there


def short(put: Callable[[str, str], None], here: str, there: str) -> None:
    """Puts the first bytes of a file of 11."""
    Path(here).write_bytes(b"x" * 10)
    put(here, there)
    Path(here).write_bytes(b"x" * 11)


@pytest.mark.parametrize(
    ("put", "error", "said"),
    [
        (denied, UserError, "step 1: Access Denied; there is no complete one yet"),
        (short, OSError, "10 of 11 bytes arrived"),
    ],
)
def test_what_cannot_be_put_or_arrives_short_is_no_checkpoint(
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    put: Callable[..., None],
    error: type[Exception],
    said: str,
) -> None:
    saving = checkpoints_at(address, tmp_path)
    monkeypatch.setattr(saving.store.fs, "put_file", partial(put, saving.store.fs.put_file))
    saving.save(1, backend(), Counting(), TRAINER)
    with pytest.raises(error, match=said):
        saving.wait()
    assert store(address, tmp_path).names() == []


def test_a_manifest_reaches_no_file_outside(tmp_path: Path) -> None:
    place = store(f"memory://evil/{uuid.uuid4().hex}", tmp_path)
    save(Checkpoints(place, attempt="a"), 1, backend(), Counting(), TRAINER)
    files = {"../../../planted": {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    place.fs.pipe_file(
        f"{place.root}/step_00000001-a/manifest.json",
        json.dumps({"files": files, "sha256": digest}).encode(),
    )
    place.fs.pipe_file(f"{place.root}/planted", b"x")
    with pytest.raises(CheckpointError, match="must hold a checkpoint that verifies; got none"):
        verified_checkpoint(place)
    assert not (tmp_path / "planted").exists()


def test_an_address_is_a_folder_or_something_that_can_be_opened(tmp_path: Path) -> None:
    for address, folder in (
        ("", tmp_path / "checkpoints"),
        ("/big/run", Path("/big/run")),
        ("file:///big/run", Path("/big/run")),
    ):
        place = store_at(address, tmp_path)
        assert place.folder == place.staging == folder and place.url == str(folder)
    chain = "an address must be of one store, without fsspec's '::'"
    for address, said in (
        ("nowhere://x/run", "fsspec can open; got nowhere://x/run: Protocol not known: nowhere"),
        ("s3://key:secret@bucket/run", "an address must hold no credentials"),
        ("https://host/run?token=secret", "an address must hold no credentials"),
        ("simplecache::s3://key:secret@bucket/run", chain),
        ("zip://run.zip::s3://key:secret@bucket", chain),
        ("file:///run::s3://bucket", chain),
    ):
        with pytest.raises(CheckpointError, match=said) as refused:
            store_at(address, tmp_path)
        assert "secret" not in str(refused.value)


# ------------------------------------------------------------------ what a process has fetched

OTHER = """
import sys
from pathlib import Path
from pipeline.train.checkpoint.store import own_folder

folder = own_folder(Path(sys.argv[1]))
(folder / "file").touch()
print(folder, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    made = Checkpoints(store_at(f"memory://fetched/{uuid.uuid4().hex}", tmp_path), attempt="a")
    save(made, 1, backend(1), Counting(1), TRAINER)
    return made


def test_no_other_process_takes_away_what_one_has_fetched_and_what_a_dead_one_left_is_swept(
    checkpoints: Checkpoints,
) -> None:
    path, staging = checkpoints.newest(), checkpoints.store.staging
    assert path is not None
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, str(staging)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        assert theirs != path.parent and find_damage(path) is None
        checkpoints.store.sweep()
        assert (theirs / "file").exists() and find_damage(path) is None
        other.kill()
        other.wait()
    os.utime(theirs, (0, 0))  # long ago
    checkpoints.store.sweep()
    assert not theirs.exists() and find_damage(path) is None
    path = checkpoints.newest()
    assert path is not None and [*staging.iterdir()] == [path.parent]


def test_a_process_that_ends_leaves_nothing_of_what_it_fetched(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", OTHER, str(tmp_path)],
        input="",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.stdout and [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    "name", ["rule.pt", "buffers_rank0.pt", "plain/state.pt", "model.safetensors"]
)
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
