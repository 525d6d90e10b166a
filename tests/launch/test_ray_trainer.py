"""Deaths of workers are counted from the last time that the run got on.

A run gets another number of workers once it has saved, and storage that is away ends nothing.
"""

import errno
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from pipeline.launch import ray_trainer
from pipeline.launch import ray_trainer as resizing
from pipeline.launch.ray_trainer import (
    LOOK_S,
    PATIENCE_S,
    PLACES_S,
    NoPlace,
    Resizing,
    Restarts,
    Trainer,
)
from pipeline.recipe.recipe import read_json
from pipeline.track.journal import read
from pipeline.train.job import Notice, read_death
from tests.helpers.events import event

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE


@pytest.fixture
def policy(tmp_path: Path) -> Restarts:
    return Restarts(
        FailureConfig(max_failures=2, controller_failure_limit=1),
        folder=tmp_path,
        awaits_nodes=True,
    )


def dies(policy: Restarts, *, worker: int = 0) -> FailureDecision:
    return policy.make_decision(WorkerGroupError("died", {worker: RuntimeError("killed")}))


def finds_no_place(policy: Restarts) -> FailureDecision:
    return policy.make_decision(ControllerError(WorkerGroupStartupTimeoutError(2)))


def tells(policy: Restarts, kind: str, **about: object) -> None:
    with (policy.folder / "journal.jsonl").open("a") as journal:
        journal.write(json.dumps(event(kind, **about).to_dict()) + "\n")


def saves(policy: Restarts, step: int) -> None:
    tells(policy, "checkpoint", step=step)


def starts(policy: Restarts, attempt: int) -> None:
    tells(policy, "start", attempt=attempt, time=100.0 + attempt)


def test_without_anything_new_the_last_of_so_many_ends_it(policy: Restarts) -> None:
    assert [dies(policy) for _ in range(3)] == [RETRY, RETRY, RAISE]


def test_each_new_checkpoint_begins_the_count_anew(policy: Restarts) -> None:
    for step in (5, 10, 15):
        assert [dies(policy), dies(policy)] == [RETRY, RETRY]
        saves(policy, step)
    assert [dies(policy) for _ in range(3)] == [RETRY, RETRY, RAISE]


def test_a_checkpoint_of_a_step_that_was_saved_before_is_nothing_new(policy: Restarts) -> None:
    """As of a run that dies each time after the same one, or went back and saves again what it
    had.
    """
    saves(policy, 10)
    assert dies(policy) == RETRY
    saves(policy, 5)
    assert dies(policy) == RETRY
    saves(policy, 10)
    assert dies(policy) == RAISE


def test_a_smaller_micro_batch_is_and_its_death_counts_for_nothing(policy: Restarts) -> None:
    for content in ("32", "16", "8"):
        assert [dies(policy), dies(policy)] == [RETRY, RETRY]
        (policy.folder / "micro_batch.json").write_text(content)
        assert dies(policy) == RETRY
    assert [dies(policy) for _ in range(3)] == [RETRY, RETRY, RAISE]


def test_who_allows_no_restart_has_such_a_run_go_on(tmp_path: Path) -> None:
    """As one worker would, which begins again without a death."""
    policy = Restarts(FailureConfig(max_failures=0), folder=tmp_path, awaits_nodes=False)
    for content in ("16", "8"):
        (tmp_path / "micro_batch.json").write_text(content)
        assert dies(policy) == RETRY
    assert dies(policy) == RAISE


def test_what_was_there_when_it_began_is_nothing_new(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text(
        json.dumps(event("checkpoint", step=7).to_dict()) + "\n"
    )
    assert (
        dies(Restarts(FailureConfig(max_failures=0), folder=tmp_path, awaits_nodes=False)) == RAISE
    )


LOST = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:38545.")
DEATH = WorkerHealthCheckFailedError(
    "A worker health check failed.", RuntimeError("The actor is dead.")
)


@pytest.mark.parametrize(
    ("failures", "told"),
    [
        ({0: LOST, 1: KeyError("cable")}, {"worker": 1, "error": "KeyError: 'cable'"}),
        (
            {0: LOST, 1: DEATH},
            {"worker": 1, "error": "WorkerHealthCheckFailedError: The actor is dead."},
        ),
        (
            {0: DEATH, 1: LOST},
            {"worker": 0, "error": "WorkerHealthCheckFailedError: The actor is dead."},
        ),
        ({0: KeyError("cable"), 1: LOST}, None),  # which holds the journal
        ({0: LOST}, None),
    ],
    ids=["raised", "died", "worker 0 died", "worker 0 raised", "lost alone"],
)
def test_what_ended_the_workers_is_noted_for_the_journal(
    policy: Restarts, failures: dict[int, Exception], told: dict[str, object] | None
) -> None:
    assert [policy.make_decision(WorkerGroupError("died", failures)) for _ in range(3)] == [
        RETRY,
        RETRY,
        RAISE,
    ]
    assert read_death(policy.folder) == told


def test_places_that_were_there_are_waited_for(policy: Restarts) -> None:
    """Of a node that an autoscaler replaces; the deaths of workers count beside it as before."""
    starts(policy, 0)
    assert dies(policy) == RETRY
    assert {finds_no_place(policy) for _ in range(20)} == {RETRY}
    [told] = [
        event for event in read(policy.folder / "journal.jsonl") if event["event"] == "waiting"
    ]
    assert (told["what"], told["most_s"], told["attempt"]) == (
        "a place for 2 workers",
        PLACES_S,
        -1,
    )
    assert [dies(policy), dies(policy)] == [RETRY, RAISE]


def test_places_are_waited_for_an_hour_from_the_last_start(
    policy: Restarts, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for attempt in (0, 1):
        starts(policy, attempt)
        assert finds_no_place(policy) == RETRY
        now += PLACES_S - 1
        assert finds_no_place(policy) == RETRY
        now += 10 * PLACES_S
    starts(policy, 2)
    assert finds_no_place(policy) == RETRY
    now += PLACES_S
    assert [finds_no_place(policy) for _ in range(2)] == [
        RETRY,
        RAISE,
    ]  # Ray's own limit, of 1 here, decides


def test_places_that_never_were_there_are_not_waited_for(tmp_path: Path) -> None:
    for name, awaits_nodes in (("first", True), ("alone", False)):
        (tmp_path / name).mkdir()
        policy = Restarts(
            FailureConfig(max_failures=2, controller_failure_limit=1),
            folder=tmp_path / name,
            awaits_nodes=awaits_nodes,
        )
        if name == "alone":
            starts(policy, 0)
        assert [finds_no_place(policy) for _ in range(2)] == [RETRY, RAISE]


def test_no_place_now_and_then_is_counted_from_the_last_time_that_the_run_got_on(
    tmp_path: Path,
) -> None:
    policy = Restarts(
        FailureConfig(max_failures=2, controller_failure_limit=1),
        folder=tmp_path,
        awaits_nodes=False,
    )
    for step in (5, 10, 15):
        assert finds_no_place(policy) == RETRY
        saves(policy, step)
    assert [finds_no_place(policy) for _ in range(2)] == [RETRY, RAISE]


def test_whoever_asks_to_stop_meanwhile_does_not_wait(policy: Restarts) -> None:
    """There is no worker to hear of it."""
    starts(policy, 0)
    assert finds_no_place(policy) == RETRY
    (policy.folder / "stop").touch()
    assert finds_no_place(policy) == RAISE


def test_the_hour_is_that_of_one_absence(policy: Restarts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that came back and went again before the workers had told of their start is waited for
    anew.
    """
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    starts(policy, 0)
    assert finds_no_place(policy) == RETRY
    now += PLACES_S - 1
    assert dies(policy) == RETRY
    now += 10
    assert finds_no_place(policy) == RETRY
    now += PLACES_S - 1
    assert finds_no_place(policy) == RETRY


def test_storage_that_is_away_as_a_worker_dies_ends_nothing(
    policy: Restarts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was known counts on, and what is new is found once it is back."""

    def away(*asked: object, **about: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    starts(policy, 0)
    saves(policy, 5)
    assert dies(policy) == RETRY
    with monkeypatch.context() as patch:
        patch.setattr(ray_trainer, "last_event", away)
        patch.setattr(ray_trainer, "was_stopped", away)
        patch.setattr(ray_trainer, "note_death", away)
        assert [dies(policy, worker=1), finds_no_place(policy)] == [RETRY, RETRY]
    saves(policy, 10)
    assert [dies(policy) for _ in range(3)] == [RETRY, RETRY, RAISE]


@pytest.mark.parametrize(
    ("failure", "decision"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), RAISE),
        (PermissionError("Access Denied"), RAISE),  # as s3fs says it, without a number
        (OSError(errno.ESTALE, "Stale file handle"), RETRY),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), RETRY),
        (
            FileExistsError(errno.EEXIST, "File exists"),
            RETRY,
        ),  # a new process draws a name of its own
    ],
    ids=str,
)
def test_what_the_user_alone_can_change_is_not_met_again(
    policy: Restarts, failure: OSError, decision: FailureDecision
) -> None:
    assert policy.make_decision(WorkerGroupError("died", {1: failure})) == decision


def test_it_is_of_the_worker_whose_line_the_run_ends_with(policy: Restarts) -> None:
    assert (
        policy.make_decision(
            WorkerGroupError(
                "died", {0: KeyError("cable"), 1: OSError(errno.ENOSPC, "No space left on device")}
            )
        )
        == RETRY
    )


@pytest.mark.parametrize(
    ("failure", "worker", "is_noted"),
    [
        (KeyError("cable"), 1, True),
        (KeyError("cable"), 0, False),  # which has told it itself
        (WorkerHealthCheckFailedError("it is gone", RuntimeError()), 0, True),
        (ValueError("recipe: must be another"), 1, False),  # a refusal, or a page that is left out
        (torch.OutOfMemoryError("CUDA out of memory"), 1, False),
    ],
    ids=str,
)
def test_a_death_that_nobody_else_tells_is_noted(
    policy: Restarts, failure: Exception, worker: int, is_noted: bool
) -> None:
    policy.make_decision(WorkerGroupError("died", {worker: failure}))
    assert (read_death(policy.folder) is not None) == is_noted


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
