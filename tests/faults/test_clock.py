"""A machine's clock is set back while a run trains, and while it lies still: the same bits, and no
time that runs backwards.
"""

import random
import time
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.track.events import Event, Step
from pipeline.track.journal import Journal
from pipeline.track.state import state_of
from pipeline.train.checkpoint import read_trainer, step_folders
from tests.helpers.interruptions import dies_at
from tests.helpers.small import events, same_weights, small_recipe, train_inline

pytestmark = pytest.mark.timeout(120)
SEED = 20261128  # of the steps
HOUR = 3600.0


def test_set_back_in_the_middle_and_before_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, recipe = random.Random(SEED), small_recipe()
    step, turns = draw.randrange(4, 8), draw.randrange(10, 15)
    train_inline(tmp_path / "untouched", recipe)
    clock, behind, written = time.time, [0.0], Journal.write

    def write(self: Journal, event: Event, /) -> None:
        if isinstance(event, Step) and event.step == turns:
            behind[0] = 2 * HOUR
        written(self, event)

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: clock() - behind[0])
        patch.setattr(Journal, "write", write)
        with dies_at(step):
            train_inline(tmp_path / "hit", recipe)
        behind[0] = HOUR
        summary = train_inline(tmp_path / "hit", recipe)
    assert same_weights(tmp_path / "hit", tmp_path / "untouched")
    backwards = [
        later["step"]
        for earlier, later in pairwise(events(tmp_path / "hit"))
        if later["time"] < earlier["time"] - HOUR / 2
    ]
    newest = max(each for each in (0, 3, 6) if each <= step)
    assert backwards == [newest, turns], "the clock was set back at a start and at a step"
    assert state_of(tmp_path / "hit") == "finished"
    assert summary is not None and 0 < summary["net_s"] <= summary["wall_s"] < 100
    assert read_trainer(step_folders(tmp_path / "hit" / "checkpoints")[-1])["step"] == 16
