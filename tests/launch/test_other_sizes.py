"""A resume at other numbers of workers: what the recipe or its newest checkpoint refuses is refused
before Ray starts.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import pytest

from pipeline.data.mixing import Mixing
from pipeline.launch.cluster import Cluster
from pipeline.launch.prepare import prepare
from pipeline.launch.ray import Ray
from pipeline.recipe.recipe import spec
from pipeline.recipe.suite import Suite, SuiteFile
from tests.helpers.small import Command, command, small_recipe

MIXED = small_recipe(mixing=spec(Mixing, mixup=0.2))
PARENT = "a" * 32
LAUNCHED = Cluster(workers=4, device="cpu")
ODD = "Mixing: a micro-batch must be even"


class Started(Exception):
    """A cluster was."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def start(self: Ray) -> NoReturn:
        raise Started

    monkeypatch.setattr(Ray, "__enter__", start)
    return command(monkeypatch, capsys)


def resumed(started: Command, runs: Path, workers: int) -> str:
    code, _, error = started("resume", "it", "--runs", str(runs), "--workers", str(workers))
    assert code == 2 and error.count("\n") == 1
    return error.strip()


def test_a_run_is_checked_at_its_new_size(tmp_path: Path, started: Command) -> None:
    prepare(MIXED, LAUNCHED, tmp_path, name="it")
    assert ODD in resumed(started, tmp_path, 8)
    with pytest.raises(Started):
        started("resume", "it", "--runs", str(tmp_path), "--workers", "2")


def test_so_is_a_suites_that_has_begun(tmp_path: Path, started: Command) -> None:
    suite = SuiteFile(
        suite=Suite((MIXED,)).resolved(), runs=("one",), parent=PARENT, cluster=asdict(LAUNCHED)
    )
    prepare(MIXED, LAUNCHED, tmp_path, name="one", parent=PARENT, suite="it")
    (tmp_path / "it").mkdir()
    suite.write(tmp_path / "it")
    assert ODD in resumed(started, tmp_path, 8)


@pytest.mark.parametrize(
    ("trainers", "refused"),
    [
        ((), False),
        (({"world_size": 2},), True),
        (({"world_size": 4}, {"world_size": 2}), True),
        (({"world_size": 2}, {"world_size": 4}), False),
        (
            ({"world_size": 2}, None),
            True,
        ),  # a damaged one is moved away, and the one before is used
    ],
)
def test_zero_goes_on_with_as_many_workers_as_wrote_its_newest_checkpoint(
    trainers: tuple[dict[str, Any] | None, ...], refused: bool, tmp_path: Path, started: Command
) -> None:
    prepare(
        small_recipe(zero=2, backend="deepspeed"),
        Cluster(workers=2, device="cpu"),
        tmp_path,
        name="it",
    )
    for step, trainer in enumerate(trainers, start=1):
        folder = tmp_path / "it" / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        (folder / "trainer.json").write_text("torn" if trainer is None else json.dumps(trainer))
    if refused:
        assert (
            resumed(started, tmp_path, 4)
            == "resume: ZeRO-2 needs the number of workers of its newest checkpoint, 2; got 4"
        )
    else:
        with pytest.raises(Started):
            started("resume", "it", "--runs", str(tmp_path), "--workers", "4")
