"""What a run says of the machines it was trained on: of all workers', since times of unlike
machines are divided by nobody.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.measure.memory import hardware, hardware_over
from pipeline.track.journal import first
from pipeline.train.job import Job, RankInfo
from pipeline.train.worker import run
from tests.helpers.processes import run_ranks
from tests.helpers.small import make_run, small_recipe


def test_machines_that_are_alike_are_one() -> None:
    here = hardware(torch.device("cpu"))
    assert hardware_over([here]) == hardware_over([here] * 3) == here


def test_what_they_differ_in_is_told_with_how_many_have_it_whoever_is_rank_0() -> None:
    h100, a100 = {"gpu": "H100", "cores": 16}, {"gpu": "A100", "cores": 16}
    told = {"gpu": "A100 (1 of 3 workers) + H100 (2 of 3 workers)", "cores": 16}
    assert hardware_over([h100, a100, h100]) == hardware_over([a100, h100, h100]) == told
    assert hardware_over([a100, h100, a100]) != told


@pytest.mark.distributed
def test_a_run_tells_of_both_its_workers_machines(tmp_path: Path) -> None:
    job = make_run(tmp_path / "run", small_recipe(backend="deepspeed", micro_batch=4, stop_after=1))
    run_ranks(_on_its_own, 2, tmp_path, job)
    start = first(tmp_path / "run" / "journal.jsonl", "start")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert start is not None
    for told in (start["hardware"], summary["hardware"], summary["trained_on"][0]["hardware"]):
        assert (
            told["cpu"] == "cpu 0 (1 of 2 workers) + cpu 1 (1 of 2 workers)"
            and told["gpu"] == "none"
        )


def _on_its_own(rank: int, ranks: int, job: Job) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.measure.memory._cpu_model", lambda: f"cpu {rank}")
        run(job, RankInfo(rank, ranks))
