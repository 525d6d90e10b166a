import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.train.checkpoint import CheckpointStore, store_at
from tests.helpers.s3 import s3_server


@pytest.fixture(scope="package")
def bucket() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(params=["memory", "s3"])
def address(request: pytest.FixtureRequest) -> str:
    base = (
        "memory://checkpoints" if request.param == "memory" else request.getfixturevalue("bucket")
    )
    return f"{base}/{uuid.uuid4().hex}/run"


@pytest.fixture(params=["folder", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    """A place of each kind."""
    base = {"folder": str(tmp_path / "elsewhere"), "memory": "memory://checkpoints"}
    address = base.get(request.param) or request.getfixturevalue("bucket")
    return store_at(f"{address}/{uuid.uuid4().hex}/run", tmp_path / "run")
