"""A run that nothing happens to, and drivers of runs, which do not outlive their test."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.lab import Driven, Lab
from tests.helpers.small import small_recipe, train_inline


@pytest.fixture(scope="session")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `small_recipe()`."""
    run = tmp_path_factory.mktemp("untouched") / "run"
    train_inline(run, small_recipe())
    return run


@pytest.fixture
def driven() -> Iterator[Callable[..., Driven]]:
    """Starts a driver of the run of a lab, inline unless other words say where."""
    started: list[Driven] = []

    def start(lab: Lab, *words: str, terminal: int | None = None) -> Driven:
        started.append(Driven(lab, *(words or ("--inline",)), terminal=terminal))
        return started[-1]

    yield start
    for each in started:
        each.kill()
