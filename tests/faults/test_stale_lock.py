"""Locks that a killed build of DeepSpeed's extensions left, for which torch waits without an end:
nobody here asks for one.
"""

import os
from pathlib import Path

import pytest

from pipeline.train.backend.deepspeed import import_deepspeed
from pipeline.train.job import Job, RankInfo
from pipeline.train.worker import run
from tests.helpers.processes import run_ranks
from tests.helpers.small import make_run, same_weights, small_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]

ZERO = (0, 1)


def test_training_waits_for_no_build(tmp_path: Path) -> None:
    """A run beside the locks ends with the bits of one beside none."""
    recipes = [small_recipe(backend="deepspeed", epochs=1, zero=zero) for zero in ZERO]
    hit, untouched = (
        [make_run(tmp_path / f"{name}{each.zero}", each) for each in recipes]
        for name in ("hit", "untouched")
    )
    assert run_ranks(trained, 1, tmp_path, tmp_path / "extensions", hit, untouched) == [True]
    assert all(
        same_weights(tmp_path / f"hit{zero}", tmp_path / f"untouched{zero}") for zero in ZERO
    )


def trained(rank: int, ranks: int, root: Path, hit: list[Job], untouched: list[Job]) -> bool:
    """Those beside the locks first, before anything could have been built; whether nothing was."""
    import_deepspeed()
    from deepspeed.ops import __compatible_ops__ as extensions

    assert "deepspeed_shm_comm" in extensions and len(extensions) > 5
    for name in extensions:
        (root / name).mkdir(parents=True)
        (root / name / "lock").touch()
    for folder, jobs in ((root, hit), (root.parent / "nothing", untouched)):
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
        for job in jobs:
            run(job, RankInfo(rank, ranks, "cpu", rank))
    return all([file.name for file in folder.iterdir()] == ["lock"] for folder in root.iterdir())
