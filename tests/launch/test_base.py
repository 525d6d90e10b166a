"""Which device the workers train on."""

from __future__ import annotations

import os
from typing import Any

import pytest
import ray

from pipeline.core.errors import UserError
from pipeline.launch.base import takes_gpus
from pipeline.launch.ray import Ray


@pytest.mark.parametrize(
    ("device", "workers", "gpus", "expected"),
    [
        ("auto", 2, 0, False),
        ("auto", 2, 2, True),
        ("auto", 2, 8, True),
        ("cpu", 2, 8, False),
        ("gpu", 1, 1, True),
    ],
)
def test_gpus_are_taken_where_there_is_one_for_each_worker(
    device, workers: int, gpus: int, expected: bool
) -> None:
    assert takes_gpus(device, workers, gpus) is expected


@pytest.mark.parametrize(
    ("device", "gpus", "told"),
    [
        ("auto", 1, "there is 1; take fewer workers or --device cpu"),
        ("gpu", 0, "there are 0; take --device cpu"),
        ("gpu", 1, "there is 1; take fewer workers or --device cpu"),
    ],
)
def test_fewer_gpus_than_workers_are_refused(device, gpus: int, told: str) -> None:
    with pytest.raises(UserError, match=f"^launch: 2 workers need as many GPUs; {told}$"):
        takes_gpus(device, 2, gpus)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"workers": 1, "device": "gpu"},
            "launch: 1 worker needs a GPU; there are 0; take --device cpu",
        ),
        (
            {"workers": 3, "device": "cpu"},
            "launch: 3 workers x 1 cpu need 3 cores; the cluster has 2",
        ),
    ],
)
def test_what_a_cluster_lacks_is_refused_before_anything_is_launched(
    asked: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name, value in (("is_initialized", True), ("cluster_resources", {"CPU": 2.0})):
        monkeypatch.setattr(ray, name, lambda value=value: value)
    with pytest.raises(UserError) as refused, Ray(**asked):
        pass
    assert str(refused.value) == said
