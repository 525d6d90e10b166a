import time
from dataclasses import replace

import pytest

from pipeline.report.results import SILENT_S, describe_state
from pipeline.report.study import Study
from pipeline.report.tables import provenance
from pipeline.track.system import INTERVAL_S
from tests.helpers.hand_made import run


@pytest.mark.parametrize(
    ("minutes", "said"),
    [
        (1, "running"),
        (14, "running"),
        (25.5, "running, no word for 25 min"),
        (300, "running, no word for 5 h"),
    ],
)
def test_a_run_that_nobody_hears_of_says_so(minutes: float, said: str):
    heard = time.time() - 60 * minutes
    assert describe_state("running", heard) == said
    assert (
        describe_state("killed", heard) == "killed" and describe_state("running", None) == "running"
    )
    going = replace(run(state="running"), heard=heard)
    assert provenance(Study(title="t", runs=(going,))).rows[0][4] == said


def test_whoever_trains_is_heard_far_more_often():
    assert SILENT_S >= 60 * INTERVAL_S
