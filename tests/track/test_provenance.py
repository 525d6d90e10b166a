"""Which of a run's starts its result rests on."""

from typing import Any

import pytest

from pipeline.track.run_state import conditions_of, trained_on


def start(
    step: int, *, workers: int = 1, micro_batch: int = 8, cpu: str = "a cpu", **more: Any
) -> dict[str, Any]:
    """`more`: loader_threads, and the cores of its own."""
    return {
        "event": "start",
        "step": step,
        "world_size": workers,
        "micro_batch": micro_batch,
        "hardware": {"cpu": cpu},
        "loader_threads": 1,
        "own_cores": None,
        **more,
    }


@pytest.mark.parametrize(
    ("starts", "wanted"),
    [
        ([start(0)], [(1, 8)]),
        ([start(0), start(10)], [(1, 8)]),  # went on as it was
        (
            [start(0), start(0, micro_batch=4)],
            [(1, 4)],
        ),  # out of memory in the first batch: nothing of it is left
        ([start(0), start(10, micro_batch=4)], [(1, 8), (1, 4)]),
        ([start(0, workers=2), start(10)], [(2, 8), (1, 8)]),
        ([start(0, workers=2), start(10), start(15, workers=2)], [(2, 8), (1, 8)]),
        (
            [start(0, workers=4), start(10, workers=2), start(5)],
            [(4, 8), (1, 8)],
        ),  # back to before the second began
        ([start(0, workers=2), start(20)], [(2, 8)]),  # nothing left but to tell
    ],
)
def test_starts_whose_steps_were_kept(
    starts: list[dict[str, Any]], wanted: list[tuple[int, int]]
) -> None:
    found = trained_on([{"event": "step", "step": 1}, *starts], steps=20)
    assert [(each["world_size"], each["micro_batch"]) for each in found] == wanted


def test_machines_loader_threads_and_cores_count_too() -> None:
    alone, more = {"own_cores": [3]}, {"loader_threads": 2}
    starts = [
        start(0, own_cores=[0]),
        start(5, **alone),
        start(10, **alone, **more),
        start(15, **more),
        start(20, **more, cpu="another"),
    ]
    found = [tuple(each.values())[2:] for each in trained_on(starts, steps=30)]
    here, there = {"cpu": "a cpu"}, {"cpu": "another"}
    assert found == [
        *((here, 1, True), (here, 2, True), (here, 2, False)),
        (there, 2, False),
    ]
    # The newest start has trained nothing, unless the run goes on.
    assert [len(trained_on(starts, steps=steps)) for steps in (20, None)] == [3, 4]
    assert trained_on([], steps=None) == []


def test_a_summary_that_does_not_say_has_its_journal_or_the_last_machine() -> None:
    summary = {"world_size": 2, "hardware": {"cpu": "a cpu"}, "steps": 20}
    said = [
        {"world_size": 4, "micro_batch": 2, "hardware": {}, "loader_threads": 2, "own_cores": True}
    ]
    assert conditions_of({**summary, "trained_on": said}, [start(0)]) == said
    assert conditions_of(summary, [start(0)]) == trained_on([start(0)], steps=20)
    last = {
        "world_size": 2,
        "micro_batch": None,
        "hardware": {"cpu": "a cpu"},
        "loader_threads": None,
        "own_cores": False,
    }
    assert conditions_of(summary) == [last]
