"""A run gets another number of workers once it has saved, and storage that is away ends nothing."""

import errno
import math
import time
from pathlib import Path
from typing import Any

import pytest
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2.api.exceptions import ControllerError

from pipeline.launch import ray_trainer as resizing
from pipeline.launch.ray_trainer import LOOK_S, PATIENCE_S, PLACES_S, NoPlace, Resizing, Trainer
from pipeline.recipe.recipe import read_json
from pipeline.track.journal import read
from pipeline.train.job import Notice

NOTHING, GROW = NoopDecision(), ResizeDecision(num_workers=2, resources_per_worker={"CPU": 1})


@pytest.fixture
def elastic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Resizing:
    """Of a run that may grow whenever Ray looks, or has no place."""
    monkeypatch.setattr(
        ElasticScalingPolicy, "make_decision_for_running_worker_group", lambda *about: GROW
    )
    monkeypatch.setattr(
        ElasticScalingPolicy, "make_decision_for_non_running_worker_group", lambda *about: NOTHING
    )
    monkeypatch.setattr(resizing, "_leaving", lambda state: Notice((), None))
    made = Resizing(ScalingConfig(num_workers=(1, 2)), sizes=(1, 2), folder=tmp_path)
    made._ticked = math.inf  # there is no coordinator to ask
    return made


def looks(elastic: Resizing) -> ScalingDecision:
    return elastic.make_decision_for_running_worker_group(None, None)


def unable(*asked: Any, **how: Any) -> None:
    raise OSError(errno.ESTALE, "Stale file handle")


def take_away(patch: pytest.MonkeyPatch) -> None:
    for name in ("exists", "unlink"):
        patch.setattr(Path, name, unable)
    patch.setattr(resizing, "write_json", unable)


def test_it_grows_once_it_has_saved(elastic: Resizing) -> None:
    assert [looks(elastic), looks(elastic)] == [NOTHING, NOTHING]
    assert read_json(elastic.folder / "save") == {"machines": [], "deadline": None}
    (elastic.folder / "save").unlink()
    assert looks(elastic) == GROW


def test_a_save_that_does_not_come_is_waited_for_so_long(
    elastic: Resizing, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert looks(elastic) == NOTHING
    now += PATIENCE_S - 1
    assert looks(elastic) == NOTHING
    now += 1
    assert looks(elastic) == GROW and not (elastic.folder / "save").exists()


def test_storage_that_is_away_as_a_run_grows_ends_nothing(
    elastic: Resizing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be asked is asked again, and what is not known is waited for like a save that
    does not come.
    """
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with monkeypatch.context() as patch:
        take_away(patch)
        assert looks(elastic) == NOTHING
    assert not (elastic.folder / "save").exists()
    assert looks(elastic) == NOTHING and (elastic.folder / "save").exists()
    with monkeypatch.context() as patch:
        take_away(patch)
        assert looks(elastic) == NOTHING
        now += PATIENCE_S
        assert looks(elastic) == GROW


def test_whoever_asks_to_stop_waits_for_no_place_as_far_as_storage_tells(
    elastic: Resizing, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert elastic.make_decision_for_non_running_worker_group() == NOTHING
    (elastic.folder / "stop").touch()
    with monkeypatch.context() as patch:
        take_away(patch)
        assert elastic.make_decision_for_non_running_worker_group() == NOTHING
    with pytest.raises(WorkerGroupStartupTimeoutError):
        elastic.make_decision_for_non_running_worker_group()


def test_a_place_is_waited_for_an_hour_and_somebody_is_told_once(
    elastic: Resizing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one absence of all workers, in which there may be room for some now and then that do not
    begin.
    """
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def told() -> list[tuple[str, float]]:
        return [
            (event["what"], event["most_s"]) for event in read(elastic.folder / "journal.jsonl")
        ]

    for absence in (1, 2):
        assert (
            elastic.make_decision_for_non_running_worker_group() == NOTHING
            and len(told()) == absence - 1
        )
        now += LOOK_S + 1
        with monkeypatch.context() as patch:
            patch.setattr(resizing, "journal_waiting", unable)
            assert elastic.make_decision_for_non_running_worker_group() == NOTHING
        assert [elastic.make_decision_for_non_running_worker_group() for _ in range(3)] == [
            NOTHING
        ] * 3
        assert told() == [("a place for 1 worker", PLACES_S)] * absence
        now += PLACES_S - LOOK_S - 2
        with monkeypatch.context() as patch:
            patch.setattr(
                ElasticScalingPolicy,
                "make_decision_for_non_running_worker_group",
                lambda *about: GROW,
            )
            assert elastic.make_decision_for_non_running_worker_group() == GROW
        assert elastic.make_decision_for_non_running_worker_group() == NOTHING
        if absence == 1:
            looks(elastic)  # there they are
    now += 2
    with pytest.raises(
        NoPlace, match=r"^launch: 1 worker found no place in time: others have it, or a node"
    ):
        elastic.make_decision_for_non_running_worker_group()


def test_room_that_comes_after_an_hour_is_tried_once(
    elastic: Resizing, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for _ in range(2):
        assert elastic.make_decision_for_non_running_worker_group() == NOTHING
        now += PLACES_S + 1
        with monkeypatch.context() as patch:
            patch.setattr(
                ElasticScalingPolicy,
                "make_decision_for_non_running_worker_group",
                lambda *about: GROW,
            )
            assert elastic.make_decision_for_non_running_worker_group() == GROW
            with pytest.raises(NoPlace):  # they did not begin
                elastic.make_decision_for_non_running_worker_group()
        looks(elastic)  # now they did


def test_a_wait_in_vain_ends_the_run(tmp_path: Path) -> None:
    """Of several numbers of workers, for which Ray tries again without an end."""
    trainer = Trainer(
        lambda: None,
        sizes=(2, 4),
        folder=tmp_path,
        awaits_nodes=True,
        scaling_config=ScalingConfig(num_workers=(2, 4)),
        run_config=RunConfig(
            failure_config=FailureConfig(max_failures=3, controller_failure_limit=-1)
        ),
    )
    restarts = trainer._policies["failure_policy"]
    assert (
        restarts.make_decision(ControllerError(WorkerGroupStartupTimeoutError(2)))
        == FailureDecision.RETRY
    )
    assert (
        restarts.make_decision(ControllerError(NoPlace("launch: in vain"))) == FailureDecision.RAISE
    )
    assert not restarts.awaits_nodes and isinstance(
        trainer._policies["scaling_policy"], Resizing
    )  # which does
