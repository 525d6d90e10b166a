import math
from typing import Any

import pytest

from pipeline.track.mlflow import Translation


def step(number: int, **metrics: Any) -> dict[str, Any]:
    return {"event": "step", "step": number, "time": 1.5, "metrics": metrics, "memory_bytes": None}


def sent(translation: Translation, *events: dict[str, Any]) -> list[tuple[str, int, float]]:
    return [
        (point.key, point.step, point.value)
        for event in events
        for point in translation.points(event)
    ]


def test_the_first_value_of_a_step_counts_and_what_is_held_is_left_out():
    translation = Translation()
    translation.held = {"train/loss": 0}
    events = [
        step(0, loss=3.0),
        step(1, loss=2.0),
        step(1, loss=9.0),
        step(2, loss=math.nan, ok=True, name="x"),
    ]
    points = sent(translation, *events)
    assert points == [
        ("train/loss", 1, 2.0),
        ("train/loss", 2, pytest.approx(math.nan, nan_ok=True)),
    ]
    assert translation.already_there == 1


def evaluation(number: int, top1: float) -> dict[str, Any]:
    return {"event": "evaluation", "step": number, "time": float(number), "metrics": {"top1": top1}}


def checkpoint(number: int) -> dict[str, Any]:
    return {"event": "checkpoint", "step": number, "time": 99.0}


def test_an_evaluation_of_weights_that_were_given_up_is_sent_as_it_was_measured_anew():
    """Saving finds that the workers' weights differ, and goes back."""
    translation = Translation()
    back, start = {"event": "rollback", "step": 15, "to": 8}, {"event": "start", "step": 8}
    for events, points in (
        # of an earlier step, whose writing took until now
        ((evaluation(8, 0.3), checkpoint(5)), []),
        ((checkpoint(8),), [("val/top1", 8, 0.3)]),
        ((evaluation(16, 0.9), back, start), []),
        ((checkpoint(20),), []),  # the other one is gone for good
        ((evaluation(16, 0.4), checkpoint(16)), [("val/top1", 16, 0.4)]),
    ):
        assert sent(translation, *events) == points
    assert translation.tags(back) == {"spiketrain.rollbacks": "1", "spiketrain.rolled_back": "9-16"}
    assert translation.tags({**back, "step": 19})["spiketrain.rolled_back"] == "9-16, 9-20"


def test_what_is_measured_again_of_the_same_weights_is_sent_once_with_its_own_time():
    """As after a kill between an evaluation and its checkpoint."""
    translation = Translation()
    again = {**evaluation(8, 0.3), "time": 12.0}
    assert sent(translation, evaluation(8, 0.3), {"event": "start", "step": 8}, again) == []
    [point] = translation.points(checkpoint(8))
    assert (point.step, point.value, point.timestamp) == (8, 0.3, 12_000)
    assert sent(translation, again, checkpoint(9)) == []


@pytest.mark.parametrize("end", ["finish", "diverged"])
def test_the_end_of_a_run_sends_what_waits(end: str):
    assert sent(Translation(), step(16), evaluation(16, 0.4), {"event": end}) == [
        ("val/top1", 16, 0.4)
    ]


def test_a_finish_is_a_summary_at_the_newest_step():
    summary = {
        "epochs": 2,
        "top 1!": 0.5,
        "rule": "SLTT",
        "operations": {"forward": {"additions": 2.0, "who": "x"}},
    }
    finish = {"event": "finish", "step": 7, "time": 2.0, "summary": summary}
    assert sent(Translation(), step(6, loss=1.0), finish)[1:] == [
        ("summary/step", 7, 7),
        ("summary/top 1_", 7, 0.5),
        ("summary/operations/forward/additions", 7, 2.0),
    ]


@pytest.mark.parametrize(
    "address", ["/runs/a/checkpoints/step_00000008", "s3://bucket/a/step_00000008-x"]
)
def test_the_newest_checkpoint_is_a_tag_with_its_uri(address: str):
    uri = address if "://" in address else f"file://{address}"
    assert Translation().tags({**checkpoint(8), "path": address}) == {"spiketrain.checkpoint": uri}


def test_tags_count_what_was_lost():
    translation = Translation()
    lost = {"event": "skipped", "samples": 8}
    assert [translation.tags(lost) for _ in range(2)] == [
        {"spiketrain.skipped_samples": count} for count in ("8", "16")
    ]
    assert translation.tags({"event": "quarantine"}) == {"spiketrain.quarantined_checkpoints": "1"}
    start = translation.tags(
        {"event": "start", "rule": "SLTT", "commit": "ab", "hardware": {"a cpu!": 1}, "attempt": 2}
    )
    assert (
        start.items()
        >= {
            "spiketrain.rule": "SLTT",
            "hardware.a cpu_": "1",
            "spiketrain.attempt": "2",
        }.items()
    )


def test_how_an_attempt_ended_is_not_said_of_a_run_that_went_on():
    translation, start = Translation(), {"event": "start"}
    failed = {"spiketrain.error": "out of memory", "spiketrain.diverged": "false"}
    stopped = {"spiketrain.stopped": "SIGTERM"}
    for event, tags in (
        ({"event": "failed", "error": "out of memory"}, failed),
        (start, dict.fromkeys(failed, "")),
        ({"event": "stopped", "reason": "SIGTERM"}, stopped),
        (start, dict.fromkeys({**failed, **stopped}, "")),
    ):
        assert translation.tags(event) == tags


@pytest.mark.parametrize("protocol", [{"protocol": "tuned", "tuned": '["optimizer.lr"]'}, {}])
def test_the_protocol_of_a_search_is_a_tag(protocol: dict[str, str]):
    assert Translation().tags({"event": "start", "params": {**protocol, "epochs": "2"}}) == {
        f"spiketrain.{name}": value for name, value in protocol.items()
    }
