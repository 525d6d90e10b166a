"""An address of checkpoints is tried, a folder, memory and S3 (moto's server): nothing is left there, and no secret is said."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.checkpoint import CheckpointError, absolute
from pipeline.commands.doctor import doctor
from pipeline.doctor.checkpoints import Wanted, is_folder, left_at, try_address
from pipeline.marker import Marker
from tests.checkpoint.s3 import s3_server


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(params=["folder", "file", "memory", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param in ("folder", "file"):
        return {"folder": "", "file": "file://"}[request.param] + str(tmp_path / "not" / "there")
    base = "memory://checkpoints" if request.param == "memory" else request.getfixturevalue("bucket")
    return f"{base}/{uuid.uuid4().hex}"


def names(address: str) -> list[str]:
    fs, root = fsspec.url_to_fs(address, use_listings_cache=False, skip_instance_cache=True)
    return fs.find(root)


def test_what_is_put_there_is_found_read_and_deleted(address: str) -> None:
    with left_at(address) as left:
        assert isinstance(left, Marker) and len(names(address)) == 1
        kept = try_address(Wanted(address=address, left=left))
        assert len(names(address)) == 1
    assert (kept.failed, kept.sees) == ("", True)
    assert (kept.free_bytes is not None) == is_folder(address)
    assert names(address) == []


def test_another_place_of_the_same_name_is_told(tmp_path: Path) -> None:
    """As of nodes each of which has a disk of its own there."""
    with left_at(str(tmp_path / "one")) as left:
        assert isinstance(left, Marker)
        kept = try_address(Wanted(address=str(tmp_path / "two"), left=left))
    assert (kept.failed, kept.sees) == ("", False)


def test_a_bucket_that_is_not_there_is_told_and_not_made(bucket: str) -> None:
    kept = try_address(Wanted(address="s3://another/prefix"))
    assert kept.failed.startswith("cannot be written to: FileNotFoundError: The specified bucket does not exist")
    with left_at("s3://another/prefix") as left:
        assert isinstance(left, str) and left.startswith("cannot be written to: FileNotFoundError")
    assert fsspec.filesystem("s3", skip_instance_cache=True).ls("", detail=False) == [bucket.removeprefix("s3://")]


@pytest.mark.parametrize(
    ("name", "doing"),
    [("pipe_file", "be written to"), ("ls", "be listed"), ("cat_file", "be read"), ("rm_file", "give up what is deleted")],
)
def test_what_may_not_be_done_is_named_and_no_secret_is(name: str, doing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: MemoryFileSystem, *args: object, **kwargs: object) -> None:
        raise PermissionError("Access Denied\nto AKIAPLANTED with planted-secret")

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAPLANTED")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    monkeypatch.setenv("MONKEY", "to")  # a word that is no secret, for all its name
    address = f"memory://{uuid.uuid4().hex}"
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, name, denied)
        kept = try_address(Wanted(address=address))
    said = "PermissionError: Access Denied to $AWS_ACCESS_KEY_ID with $AWS_SECRET_ACCESS_KEY"
    assert kept.failed == f"cannot {doing}: {said}"
    assert names(address) == [] or name == "rm_file"


def test_a_store_that_nothing_here_opens_is_told() -> None:
    assert try_address(Wanted(address="nosuch://x")).failed.startswith("cannot be opened: ValueError: Protocol not known: nosuch")


@pytest.mark.parametrize("address", ["s3://AKIA:planted@bucket/p", "s3://bucket/p?key=planted"])
def test_an_address_with_credentials_is_refused_before_anything_is_made(address: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no credentials") as refused:
        doctor(runs=tmp_path / "runs", checkpoints=address)
    assert "planted" not in str(refused.value) and not (tmp_path / "runs").exists()


def test_a_folder_is_the_same_for_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("kept") == str(tmp_path / "kept")
    assert absolute("s3://bucket/p") == "s3://bucket/p"
