"""Which device the workers train on.

Cores and loader threads of a worker: its share of a node with GPUs, one on a CPU, and what
somebody has said.
"""

import os
from typing import Any

import pytest
import ray

from pipeline.core.errors import DataError, UserError
from pipeline.data.ffcv import tbb
from pipeline.launch.base import Share, share_of, takes_gpus
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


NODE = {"CPU": 64.0, "GPU": 8.0, "memory": 1e12}
HEAD = {"CPU": 4.0}


@pytest.mark.parametrize(
    ("nodes", "cores"),
    [
        ([NODE], 8),
        ([NODE, HEAD], 8),
        ([NODE, {"CPU": 30.0, "GPU": 4.0}], 7),
        ([{"CPU": 4.0, "GPU": 8.0}], 1),
        ([{"CPU": 0.0, "GPU": 1.0}], 1),
        ([], 1),
    ],
)
def test_a_worker_with_a_gpu_gets_its_share_of_the_node(
    nodes: list[dict[str, float]], cores: int
) -> None:
    assert share_of(nodes, gpus=True) == Share(cores, cores)


def test_a_worker_on_a_cpu_gets_one() -> None:
    assert share_of([NODE], gpus=False) == Share(1, 1)


@pytest.mark.parametrize(
    ("said", "share"),
    [
        ({"cores": 4}, Share(4, 4)),
        ({"loader_threads": 2}, Share(8, 2)),
        ({"cores": 16, "loader_threads": 12}, Share(16, 12)),
    ],
)
def test_what_somebody_has_said_stays(said: dict[str, Any], share: Share) -> None:
    assert share_of([NODE], gpus=True, **said) == share


def test_without_tbb_one_thread_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba's wheels have none for ARM; the reader refuses several threads there."""

    def none() -> None:
        raise DataError("data: more than 1 loader thread needs TBB")

    monkeypatch.setattr(tbb, "require_tbb", none)
    assert share_of([NODE], gpus=True) == Share(8, 1)
    assert share_of([NODE], gpus=True, loader_threads=8) == Share(
        8, 8
    )  # refused by the reader, in its own words
