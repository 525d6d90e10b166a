"""What a run meets on its machine: a clock that is set back while it trains and while it lies
still, and locks that a killed build of DeepSpeed's extensions left, for which torch waits without
an end.
"""

import os
import random
import time
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.track.events import Event, Step
from pipeline.track.journal import Journal
from pipeline.track.run_state import state_of
from pipeline.train.backend.deepspeed import import_deepspeed
from pipeline.train.job import Job, RankInfo
from pipeline.train.worker import run
from tests.helpers.interruptions import dies_at, newest
from tests.helpers.processes import run_ranks
from tests.helpers.small import events, make_run, same_weights, small_recipe, train_inline

pytestmark = pytest.mark.timeout(120)
SEED = 20261128  # of the steps
HOUR = 3600.0


def test_a_clock_that_is_set_back_in_the_middle_and_before_a_resume(
    tmp_path: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, folder = random.Random(SEED), tmp_path / "hit"
    step, turns = draw.randrange(4, 8), draw.randrange(10, 15)
    clock, behind, written = time.time, [0.0], Journal.write

    def write(self: Journal, event: Event, /) -> None:
        if isinstance(event, Step) and event.step == turns:
            behind[0] = 2 * HOUR
        written(self, event)

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: clock() - behind[0])
        patch.setattr(Journal, "write", write)
        with dies_at(step):
            train_inline(folder, small_recipe())
        behind[0] = HOUR
        summary = train_inline(folder, small_recipe())
    assert same_weights(folder, untouched)
    backwards = [
        later["step"]
        for earlier, later in pairwise(events(folder))
        if later["time"] < earlier["time"] - HOUR / 2
    ]
    assert backwards == [newest(step), turns], "the clock was set back at a start and at a step"
    assert state_of(folder) == "finished"
    assert summary is not None and 0 < summary["net_s"] <= summary["wall_s"] < 100


@pytest.mark.distributed
def test_training_waits_for_no_build(tmp_path: Path) -> None:
    hit, untouched = (
        [
            make_run(
                tmp_path / f"{name}{zero}", small_recipe(backend="deepspeed", epochs=1, zero=zero)
            )
            for zero in (0, 1)
        ]
        for name in ("hit", "untouched")
    )
    assert run_ranks(trained, 1, tmp_path, tmp_path / "extensions", hit, untouched) == [True]
    for one, other in zip(hit, untouched, strict=True):
        assert same_weights(Path(one.run), Path(other.run))


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
