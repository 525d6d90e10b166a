"""The pictures of the tests."""

from pathlib import Path

import pytest

from tests.data.write.stamps.made import make


@pytest.fixture(scope="session")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands for /usr/share; a test that spoils it takes a copy."""
    return make(tmp_path_factory.mktemp("share"))
