"""What Ray is asked for, without any."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.exceptions import ControllerError

from pipeline.job import Job
from pipeline.launch import trainer
from pipeline.launch.base import LaunchError
from pipeline.launch.places import NoPlace
from pipeline.launch.ray import Ray


@pytest.mark.parametrize("hang_minutes", [0.3, 30.0, 600.0])
def test_workers_wait_for_one_another_until_long_after_a_watchdog_has_ended_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hang_minutes: float
) -> None:
    """Else the one that is well gives up first, and Ray ends the other before it has said what it hangs in."""
    assert group_timeout(tmp_path, monkeypatch, hang_minutes) >= 60 * hang_minutes + 300


def test_where_nobody_watches_they_wait_for_more_than_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert group_timeout(tmp_path, monkeypatch, 0.0) > 24 * 3600


def test_a_wait_for_places_in_vain_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray says so of a fixed number, `Resizing` of several."""
    for failure in (WorkerGroupStartupTimeoutError(2), NoPlace("in vain")):
        with pytest.raises(LaunchError, match=r"^launch: 2 workers found no place in time: others have it, or a node"):
            run(tmp_path, monkeypatch, ControllerError(failure))


def group_timeout(folder: Path, patch: pytest.MonkeyPatch, hang_minutes: float) -> float:
    """Seconds, of the process group that Ray makes."""
    return run(folder, patch, None, hang_minutes=hang_minutes)["torch_config"].timeout_s


def run(folder: Path, patch: pytest.MonkeyPatch, error: Exception | None, **about: Any) -> dict[str, Any]:
    """What Ray's trainer is asked for two workers, which end with `error`."""
    asked: dict[str, Any] = {}

    def fit() -> SimpleNamespace:
        if error is not None:
            raise error
        return SimpleNamespace(return_value=None)

    def asks(work: Any, **words: Any) -> SimpleNamespace:
        asked.update(words)
        return SimpleNamespace(fit=fit)

    patch.setattr(trainer, "Trainer", asks)
    patch.setattr(ray, "cluster_resources", dict)
    Ray(workers=2, device="cpu").run(Job(run=str(folder), study="s", data_fingerprint="f", commit="c", **about), "1")
    return asked
