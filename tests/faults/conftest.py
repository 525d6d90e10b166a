"""A run that nothing happens to, which tests of faults compare theirs with."""

from pathlib import Path

import pytest

from tests.helpers.small import small_recipe, train_inline


@pytest.fixture(scope="session")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `small_recipe()`."""
    run = tmp_path_factory.mktemp("untouched") / "run"
    train_inline(run, small_recipe())
    return run
