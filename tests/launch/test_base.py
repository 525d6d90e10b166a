"""Which device the workers train on."""

from __future__ import annotations

import pytest

from pipeline.launch.base import takes_gpus
from pipeline.refused import Refused


@pytest.mark.parametrize(
    ("device", "workers", "gpus", "expected"),
    [("auto", 2, 0, False), ("auto", 2, 2, True), ("auto", 2, 8, True), ("cpu", 2, 8, False), ("gpu", 1, 1, True)],
)
def test_gpus_are_taken_where_there_is_one_for_each_worker(device, workers: int, gpus: int, expected: bool) -> None:
    assert takes_gpus(device, workers, gpus) is expected


@pytest.mark.parametrize(("device", "gpus"), [("auto", 1), ("gpu", 0), ("gpu", 1)])
def test_fewer_gpus_than_workers_are_refused(device, gpus: int) -> None:
    with pytest.raises(Refused, match=f"2 workers need as many GPUs; there are {gpus}; take fewer workers or --device cpu"):
        takes_gpus(device, 2, gpus)
