"""Forecasts that measure in one round of one batch: only tests of rounds need more."""

from collections.abc import Iterator

import pytest

from pipeline.forecast import bench


@pytest.fixture(scope="module", autouse=True)
def one_round() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "ROUNDS", 1)
        patch.setattr(bench, "TIMED", 1)
        yield
