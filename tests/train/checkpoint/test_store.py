"""Checkpoints at an address of fsspec's, in memory and in S3 (moto's server): whole or not there,
verified, pruned, swept.
"""

import errno
import hashlib
import json
import uuid
from contextlib import nullcontext
from functools import partial, partialmethod
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from pipeline.core.errors import UserError
from pipeline.train.checkpoint import CheckpointError, Checkpoints, Place, place_at, prune, verified
from tests.helpers.few import FILES, TRAINER, Counting, backend, feedback, restore, save

pytestmark = pytest.mark.timeout(120)


def store(address: str, run: Path) -> Place:
    place = place_at(address, run)
    assert place.folder is None
    return place


def checkpoints(address: str, run: Path, **more: object) -> Checkpoints:
    return Checkpoints(store(address, run), attempt="a", **more)  # type: ignore[arg-type]


def paths(address: str) -> set[str]:
    """Of all that lies there, below the address."""
    fs, root = fsspec.url_to_fs(address, use_listings_cache=False, skip_instance_cache=True)
    return {path.removeprefix(root).strip("/") for path in fs.find(root)}


def lost(*args: object, **more: object) -> None:
    raise OSError(errno.ECONNRESET, "Connection reset by peer")


def denied(*args: object, **more: object) -> None:
    raise PermissionError("Access Denied")  # as s3fs says it, without a number


def cut_at(patch: pytest.MonkeyPatch, name: str) -> None:
    """The connection is lost before a file of this name is put."""
    put = Place._put
    patch.setattr(
        Place,
        "_put",
        lambda self, file, path: (lost if path.endswith(f"/{name}") else put)(self, file, path),
    )


def test_an_upload_that_was_cut_short_is_no_checkpoint_and_is_swept(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = checkpoints(address, tmp_path)
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
    assert restore(checkpoints(address, tmp_path / "fresh"), backend(), Counting())["step"] == 1
    assert not any("step_00000002" in path for path in paths(address))


@pytest.mark.parametrize(
    ("how", "at"),
    [*(("put", name) for name in sorted(FILES)), ("removed", "rng_rank0.pt"), ("put", "nowhere")],
)
def test_a_step_that_is_saved_again_leaves_the_old_or_the_new_wherever_it_is_cut(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, how: str
) -> None:
    saving = checkpoints(address, tmp_path, keep=1)
    save(saving, 1, backend(1), Counting(1), TRAINER)
    save(saving, 2, backend(2), Counting(2), TRAINER)
    fs = saving.place.fs

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
            assert told is not None and ("Connection reset by peer" in told.untidy) == (
                how == "removed"
            )
    assert store(address, tmp_path).names() == ["step_00000002"]
    fresh = checkpoints(address, tmp_path / "fresh", keep=1)
    assert feedback(fresh.place) == (3 if is_new else 2)
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
    assert [each.untidy for each in told] == ["PermissionError: Access Denied"] * 3
    assert feedback(store(address, tmp_path / "fresh")) == 2


def test_a_request_that_failed_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a store whose `exists` is fsspec's own, which says no of any failure."""
    address, lost = f"memory://away/{uuid.uuid4().hex}", list[str]()
    originals = {name: getattr(MemoryFileSystem, name) for name in ("info", "cat_file")}
    saving = checkpoints(address, tmp_path)
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
        ("step_00000003-a/manifest.json", lambda: verified(place)),
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


def test_a_bucket_that_lets_nobody_write_ends_the_run(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = store(address, tmp_path)

    monkeypatch.setattr(place.fs, "put_file", denied)
    saving = Checkpoints(place, attempt="a")
    saving.save(1, backend(), Counting(), TRAINER)
    with pytest.raises(
        UserError,
        match=(
            "checkpoint: cannot be written after step 1: Access Denied; there is no whole one yet"
        ),
    ):
        saving.wait()


def test_what_arrives_shorter_than_it_was_is_told(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = store(address, tmp_path)
    put, saving = place.fs.put_file, Checkpoints(place, attempt="a")

    def short(here: str, there: str) -> None:
        Path(here).write_bytes(Path(here).read_bytes()[:10])
        put(here, there)
        Path(here).write_bytes(b"x" * 11)

    monkeypatch.setattr(place.fs, "put_file", short)
    saving.save(1, backend(), Counting(), TRAINER)
    with pytest.raises(OSError, match="10 of 11 bytes arrived"):
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
    with pytest.raises(CheckpointError, match="needs a checkpoint that verifies; got none"):
        verified(place)
    assert not (tmp_path / "planted").exists()


def test_an_address_is_a_folder_or_something_that_can_be_opened(tmp_path: Path) -> None:
    for address, folder in (
        ("", tmp_path / "checkpoints"),
        ("/big/run", Path("/big/run")),
        ("file:///big/run", Path("/big/run")),
    ):
        place = place_at(address, tmp_path)
        assert place.folder == place.staging == folder and place.url == str(folder)
    chain = "an address must be of one store, without fsspec's '::'"
    for address, said in (
        ("nowhere://x/run", "fsspec can open; got nowhere://x/run: Protocol not known: nowhere"),
        ("s3://key:secret@bucket/run", "an address holds no credentials"),
        ("https://host/run?token=secret", "an address holds no credentials"),
        ("simplecache::s3://key:secret@bucket/run", chain),
        ("zip://run.zip::s3://key:secret@bucket", chain),
        ("file:///run::s3://bucket", chain),
    ):
        with pytest.raises(CheckpointError, match=said) as refused:
            place_at(address, tmp_path)
        assert "secret" not in str(refused.value)
