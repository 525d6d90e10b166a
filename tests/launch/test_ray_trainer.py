"""Deaths of workers are counted from the last time that the run got on.

A run gets another number of workers once it has saved, and storage that is away ends nothing.
"""

import errno
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
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
from pipeline.launch.ray_trainer import (
    CHECK_INTERVAL_S,
    RESOURCES_TIMEOUT_S,
    SAVE_TIMEOUT_S,
    NoResources,
    Resizing,
    Restarts,
    Trainer,
)
from pipeline.recipe.recipe import read_json
from pipeline.train.job import Notice, read_death
from tests.helpers.events import event
from tests.helpers.small import events

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE


Act = Callable[[Restarts], FailureDecision | None]
NOW = [1000.0]  # seconds, of the clock that the policies read


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: NOW[0])


def restarts(folder: Path, *, most: int = 2, waits_for_nodes: bool = True) -> Restarts:
    return Restarts(
        FailureConfig(max_failures=most, controller_failure_limit=1),
        folder=folder,
        waits_for_nodes=waits_for_nodes,
    )


@pytest.fixture
def policy(tmp_path: Path) -> Restarts:
    return restarts(tmp_path)


def dies(policy: Restarts, *, worker: int = 0) -> FailureDecision:
    return policy.make_decision(WorkerGroupError("died", {worker: RuntimeError("killed")}))


def lacks_room(policy: Restarts) -> FailureDecision:
    return policy.make_decision(ControllerError(WorkerGroupStartupTimeoutError(2)))


def stopped(policy: Restarts) -> None:
    (policy.folder / "stop").touch()


def writes(kind: str, **about: object) -> Act:
    def write(policy: Restarts) -> None:
        with (policy.folder / "journal.jsonl").open("a") as journal:
            journal.write(json.dumps(event(kind, **about).to_dict()) + "\n")

    return write


def saves(step: int) -> Act:
    return writes("checkpoint", step=step)


def starts(attempt: int) -> Act:
    return writes("start", attempt=attempt, time=100.0 + attempt)


def halves(content: str) -> Act:
    """The micro-batch."""

    def halve(policy: Restarts) -> None:
        (policy.folder / "decisions.json").write_text(content)

    return halve


def passes(seconds: float) -> Act:
    def wait(policy: Restarts) -> None:
        NOW[0] += seconds

    return wait


@pytest.mark.parametrize(
    ("about", "acts", "retries", "ends"),
    [
        ({}, [dies] * 3, 2, True),
        (
            {},
            [each for step in (5, 10, 15) for each in (dies, dies, saves(step))] + [dies] * 3,
            8,
            True,
        ),
        ({}, [saves(10), dies, saves(5), dies, saves(10), dies], 2, True),
        (
            {},
            [each for size in ("32", "16", "8") for each in (dies, dies, halves(size), dies)]
            + [dies] * 3,
            11,
            True,
        ),
        (
            {"most": 0, "waits_for_nodes": False},
            [halves("16"), dies, halves("8"), dies, dies],
            2,
            True,
        ),
        ({}, [starts(0), dies, *[lacks_room] * 20, dies, dies], 22, True),
        (
            {},
            [
                *(
                    each
                    for attempt in (0, 1)
                    for each in (
                        *(starts(attempt), lacks_room, passes(RESOURCES_TIMEOUT_S - 1)),
                        *(lacks_room, passes(10 * RESOURCES_TIMEOUT_S)),
                    )
                ),
                *(starts(2), lacks_room, passes(RESOURCES_TIMEOUT_S), lacks_room, lacks_room),
            ],
            6,
            True,
        ),
        ({}, [lacks_room, lacks_room], 1, True),
        ({"waits_for_nodes": False}, [starts(0), lacks_room, lacks_room], 1, True),
        (
            {"waits_for_nodes": False},
            [each for step in (5, 10, 15) for each in (lacks_room, saves(step))] + [lacks_room] * 2,
            4,
            True,
        ),
        ({}, [starts(0), lacks_room, stopped, lacks_room], 1, True),
        (
            {},
            [
                *(starts(0), lacks_room, passes(RESOURCES_TIMEOUT_S - 1), dies, passes(10)),
                *(lacks_room, passes(RESOURCES_TIMEOUT_S - 1), lacks_room),
            ],
            4,
            False,
        ),
    ],
    ids=[
        "nothing new",
        "each new checkpoint begins the count anew",
        "a checkpoint of a step that was saved before is nothing new",
        "a smaller micro-batch is, and its death counts for nothing",
        "a smaller micro-batch where no restart is allowed",
        "places that were there are waited for, and deaths count beside it",
        "an hour from the last start, then Ray's own limit decides",
        "places that never were there are not waited for",
        "nor those of the only machine",
        "no place now and then is counted from the last progress",
        "who asks to stop does not wait",
        "the hour is that of one absence, even before a start is journalled",
    ],
)
def test_a_run_goes_on_as_long_as_it_gets_on(
    tmp_path: Path, about: dict[str, Any], acts: list[Act], retries: int, ends: bool
) -> None:
    """It is retried so often, and then it ends."""
    policy = restarts(tmp_path, **about)
    assert [decision for act in acts if (decision := act(policy)) is not None] == [
        RETRY
    ] * retries + [RAISE] * ends


def test_what_was_there_when_it_began_is_nothing_new(policy: Restarts) -> None:
    saves(7)(policy)
    assert dies(restarts(policy.folder, most=0, waits_for_nodes=False)) == RAISE


LOST = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:38545.")
DEATH = WorkerHealthCheckFailedError(
    "A worker health check failed.", RuntimeError("The actor is dead.")
)


FULL = OSError(errno.ENOSPC, "No space left on device")
UNABLE = Mock(side_effect=OSError(errno.ESTALE, "Stale file handle"))
GONE = {"worker": 1, "error": "WorkerHealthCheckFailedError: The actor is dead."}


@pytest.mark.parametrize(
    ("failures", "decision", "death"),
    [
        ({0: LOST, 1: KeyError("cable")}, RETRY, {"worker": 1, "error": "KeyError: 'cable'"}),
        ({0: LOST, 1: DEATH}, RETRY, GONE),
        ({0: DEATH, 1: LOST}, RETRY, {**GONE, "worker": 0}),
        ({0: KeyError("cable"), 1: LOST}, RETRY, None),  # worker 0 holds the journal
        ({0: LOST}, RETRY, None),
        # Refusals and too large micro-batches have notes of their own.
        ({1: ValueError("recipe: must be another")}, RETRY, None),
        ({1: torch.OutOfMemoryError("CUDA out of memory")}, RETRY, None),
        # What the user alone can change is not met again.
        ({0: FULL}, RAISE, None),
        ({0: PermissionError("Access Denied")}, RAISE, None),  # as s3fs says it, without a number
        ({0: OSError(errno.ESTALE, "Stale file handle")}, RETRY, None),
        ({0: FileNotFoundError(errno.ENOENT, "No such file or directory")}, RETRY, None),
        # A new process draws a name of its own.
        ({0: FileExistsError(errno.EEXIST, "File exists")}, RETRY, None),
        # The worker whose line the run ends with decides.
        ({0: KeyError("cable"), 1: FULL}, RETRY, None),
    ],
    ids=str,
)
def test_what_ended_the_workers_decides_and_is_noted_for_the_journal(
    policy: Restarts,
    failures: dict[int, Exception],
    decision: FailureDecision,
    death: dict[str, object] | None,
) -> None:
    """Worker 0 notes its own errors."""
    assert policy.make_decision(WorkerGroupError("died", failures)) == decision
    assert read_death(policy.folder) == death


def test_a_wait_for_places_is_journalled_once(policy: Restarts) -> None:
    starts(0)(policy)
    assert {lacks_room(policy) for _ in range(20)} == {RETRY}
    [told] = events(policy.folder, "waiting")
    assert (told["what"], told["most_s"], told["attempt"]) == (
        "resources for 2 workers",
        RESOURCES_TIMEOUT_S,
        -1,
    )


def test_storage_that_is_away_as_a_worker_dies_ends_nothing(
    policy: Restarts, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts(0)(policy)
    saves(5)(policy)
    assert dies(policy) == RETRY
    with monkeypatch.context() as patch:
        for name in ("last_event", "was_stopped", "note_death"):
            patch.setattr(ray_trainer, name, UNABLE)
        assert [dies(policy, worker=1), lacks_room(policy)] == [RETRY, RETRY]
    saves(10)(policy)
    assert [dies(policy) for _ in range(3)] == [RETRY, RETRY, RAISE]


NOTHING, GROW = NoopDecision(), ResizeDecision(num_workers=2, resources_per_worker={"CPU": 1})


@pytest.fixture
def elastic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Resizing:
    monkeypatch.setattr(
        ElasticScalingPolicy, "make_decision_for_running_worker_group", lambda *about: GROW
    )
    monkeypatch.setattr(
        ElasticScalingPolicy, "make_decision_for_non_running_worker_group", lambda *about: NOTHING
    )
    monkeypatch.setattr(ray_trainer, "_drain_notice", lambda state: Notice((), None))
    made = Resizing(ScalingConfig(num_workers=(1, 2)), sizes=(1, 2), folder=tmp_path)
    made._recomputed_at = math.inf  # there is no coordinator to ask
    return made


def looks(elastic: Resizing) -> ScalingDecision:
    return elastic.make_decision_for_running_worker_group(None, None)


def take_away(patch: pytest.MonkeyPatch) -> None:
    for name in ("exists", "unlink"):
        patch.setattr(Path, name, UNABLE)
    patch.setattr(ray_trainer, "write_json", UNABLE)


def test_it_grows_once_it_has_saved(elastic: Resizing) -> None:
    assert [looks(elastic), looks(elastic)] == [NOTHING, NOTHING]
    assert read_json(elastic.folder / "save") == {"machines": [], "deadline": None}
    (elastic.folder / "save").unlink()
    assert looks(elastic) == GROW


def test_a_save_that_does_not_come_is_waited_for_so_long(
    elastic: Resizing, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert looks(elastic) == NOTHING
    NOW[0] += SAVE_TIMEOUT_S - 1
    assert looks(elastic) == NOTHING
    NOW[0] += 1
    assert looks(elastic) == GROW and not (elastic.folder / "save").exists()


def test_storage_that_is_away_as_a_run_grows_ends_nothing(
    elastic: Resizing, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        take_away(patch)
        assert looks(elastic) == NOTHING
    assert not (elastic.folder / "save").exists()
    assert looks(elastic) == NOTHING and (elastic.folder / "save").exists()
    with monkeypatch.context() as patch:
        take_away(patch)
        assert looks(elastic) == NOTHING
        NOW[0] += SAVE_TIMEOUT_S
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

    def told() -> list[tuple[str, float]]:
        return [(event["what"], event["most_s"]) for event in events(elastic.folder)]

    for absence in (1, 2):
        assert (
            elastic.make_decision_for_non_running_worker_group() == NOTHING
            and len(told()) == absence - 1
        )
        NOW[0] += CHECK_INTERVAL_S + 1
        with monkeypatch.context() as patch:
            patch.setattr(ray_trainer, "journal_waiting", UNABLE)
            assert elastic.make_decision_for_non_running_worker_group() == NOTHING
        assert [elastic.make_decision_for_non_running_worker_group() for _ in range(3)] == [
            NOTHING
        ] * 3
        assert told() == [("resources for 1 worker", RESOURCES_TIMEOUT_S)] * absence
        NOW[0] += RESOURCES_TIMEOUT_S - CHECK_INTERVAL_S - 2
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
    NOW[0] += 2
    with pytest.raises(NoResources):
        elastic.make_decision_for_non_running_worker_group()


def test_a_wait_in_vain_ends_the_run(tmp_path: Path) -> None:
    trainer = Trainer(
        lambda: None,
        sizes=(2, 4),
        folder=tmp_path,
        waits_for_nodes=True,
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
    assert restarts.make_decision(ControllerError(NoResources())) == FailureDecision.RAISE
    assert not restarts.waits_for_nodes and isinstance(
        trainer._policies["scaling_policy"], Resizing
    )  # which does


def test_no_process_is_started_for_data_sets_of_rays(tmp_path: Path) -> None:
    """Each attempt would start one, whose imports compute for 2 s."""
    trainer = Trainer(lambda: None, sizes=(2,), folder=tmp_path, waits_for_nodes=False)
    rays, ours = (
        {type(each).__name__ for each in create(trainer)}
        for create in (TorchTrainer._create_default_callbacks, Trainer._create_default_callbacks)
    )
    assert rays - ours == {"DatasetsCallback"}
