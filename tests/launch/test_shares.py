"""Cores and loader threads of a worker: its share of a node with GPUs, one on a CPU, and what
somebody has said.
"""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.core.errors import DataError
from pipeline.data.ffcv import tbb
from pipeline.launch.shares import Share, share_of

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
