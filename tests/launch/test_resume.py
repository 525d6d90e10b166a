"""`launch --or-resume`, with the words that a scheduler says each time: it goes on with what has
begun, if it is the same recipe.

What it, or `resume`, says of how it trains holds from then on.

A resume at other numbers of workers: what the recipe or its newest checkpoint refuses is refused
before Ray starts.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from pipeline.data.mixing import Mixing
from pipeline.launch.cluster import Cluster
from pipeline.launch.driver import Inline
from pipeline.launch.prepare import prepare, read_job, write_job
from pipeline.launch.ray import Ray
from pipeline.recipe.recipe import read_json, spec
from pipeline.recipe.suite import Suite, SuiteFile, runs_of
from pipeline.track.run_state import state_of
from tests.helpers.interruptions import before_batch
from tests.helpers.small import Command, Done, Refused, same_weights, small_recipe, steps_of

pytestmark = pytest.mark.timeout(120)  # a few runs and a new MLflow store

ONE = """
from tests.helpers.small import small_recipe

def recipe():
    return small_recipe(name="one", epochs=1)
"""
TWO = ONE.replace(
    "return small_recipe(", "return small_recipe(name='other', epochs=1), small_recipe("
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("again")
    (folder / "one.py").write_text(ONE)
    (folder / "two.py").write_text(TWO)
    with pytest.MonkeyPatch.context() as patch:
        store = shutil.copy(empty_store, folder / "mlflow.db")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
        yield folder


def words(
    place: Path, runs: Path, file: str = "one.py", name: str = "it", how: str = "--inline"
) -> list[str]:
    return [
        "launch",
        str(place / file),
        *f"{how} --device cpu --runs {runs} --name {name} --or-resume".split(),
    ]


def stopped_at(patch: pytest.MonkeyPatch, step: int) -> None:
    before_batch(patch, lambda trainer: (trainer.folder / "stop").touch(), step=step)


def stopped(spiketrain: Command, words: list[str], step: int = 3) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(patch, step)
        assert spiketrain(*words)[0] == 130


def test_the_same_words_begin_go_on_and_end(
    place: Path, tmp_path: Path, spiketrain: Command, done: Done
) -> None:
    run, again = tmp_path / "it", words(place, tmp_path)
    stopped(spiketrain, again)
    assert state_of(run) == "stopped"
    assert done(*again, "--verify", "full").startswith(
        "it: --verify was sampled, is full from now on\n"
    )
    assert {read_json(run / file)["verify"] for file in ("cluster.json", "job.json")} == {"full"}
    assert steps_of(run, "start") == [0, 4]
    assert done(*again).startswith("it has finished")
    done(*words(place, tmp_path, name="whole"))
    assert same_weights(run, tmp_path / "whole")


def test_a_suite_goes_on_where_it_stopped(
    place: Path, tmp_path: Path, spiketrain: Command, done: Done, refused: Refused
) -> None:
    again = words(place, tmp_path, "two.py")
    stopped(spiketrain, again)
    assert "other" in done(*again) and "it has finished" in done(*again)
    error = refused(*again, "--set", "optimizer.lr=0.25")
    said = "continues it as it was launched; got another recipe: other.optimizer.lr: "
    assert said in error
    error = refused(*words(place, tmp_path))
    assert error.endswith("as it was launched, as a suite; got one recipe")


def test_another_recipe_is_refused_with_the_fields_that_differ(
    place: Path, tmp_path: Path, done: Done, refused: Refused
) -> None:
    again, elsewhere = words(place, tmp_path), str(tmp_path / "elsewhere")
    done(*again)
    rule = "launch: --or-resume continues it as it was launched"
    assert refused(*again, "--set", "optimizer.lr=0.25", "--set", "seed=7") == (
        f"{rule}; got another recipe: optimizer.lr: 0.1 and 0.25; seed: 0 and 7"
    )
    error = refused(*words(place, tmp_path, "two.py"))
    assert error == f"{rule}, as one run; got a suite"
    # What only a launch can say is refused, and the rest is not.
    error = refused(*again, "--checkpoints", elsewhere, "--loader-threads", "2")
    assert error == f"{rule}; got other options: --checkpoints was None, is {elsewhere}"
    assert done(*words(place, tmp_path, how="--workers 2 --loader-threads 2")).startswith(
        "it has finished"
    )


@pytest.mark.parametrize("written", ["[]", '{"version": 1}', '{"version": 1, "recipe": []}'])
def test_a_recipe_json_without_a_recipe_is_refused_in_one_line(
    place: Path, tmp_path: Path, refused: Refused, written: str
) -> None:
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "recipe.json").write_text(written)
    assert refused(*words(place, tmp_path)).startswith(
        f"{tmp_path}/it/recipe.json: must hold a recipe; got "
    )


def test_it_needs_a_name(place: Path, tmp_path: Path, refused: Refused) -> None:
    error = refused("launch", str(place / "one.py"), "--runs", str(tmp_path), "--or-resume")
    assert error == "launch: --or-resume needs the --name of a run or suite; got none"


# ----------------------------------------------------------------------- a machine of another shape


@pytest.fixture
def launcher_of(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Is asked for the launcher of a cluster. All train in this process."""
    launcher_of = Mock(side_effect=lambda cluster: Inline(device="cpu"))
    for module in ("driver", "resume", "suite"):
        monkeypatch.setattr(f"pipeline.launch.{module}.launcher_of", launcher_of)
    return launcher_of


def test_a_run_goes_on_with_fewer_cores_and_keeps_what_nobody_changes(
    place: Path, tmp_path: Path, spiketrain: Command, done: Done, launcher_of: Mock
) -> None:
    launch = f"launch {place}/one.py --cpus-per-worker 2 --verify full --runs {tmp_path} --name it"
    stopped(spiketrain, launch.split())
    resume = ["resume", str(tmp_path / "it")]
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(patch, 5)
        code, said, error = spiketrain(*resume, "--cpus-per-worker", "1", "--hang-minutes", "5")
    assert code == 130, error
    assert said.startswith(
        "it: --cpus-per-worker was 2, is 1, --hang-minutes was 30.0, is 5.0 from now on\n"
    )
    job = read_json(tmp_path / "it" / "job.json")
    assert (job["threads"], job["hang_minutes"], job["verify"]) == (1, 5.0, "full")
    assert "from now on" not in done(*resume)
    assert [
        (cluster.cpus_per_worker, cluster.hang_minutes, cluster.verify)
        for (cluster,), _ in launcher_of.call_args_list
    ] == [(2, 30.0, "full"), (1, 5.0, "full"), (1, 5.0, "full")]


def test_a_suite_goes_on_with_fewer_cores_in_the_run_that_has_begun_and_in_the_next(
    place: Path, tmp_path: Path, spiketrain: Command, done: Done, launcher_of: Mock
) -> None:
    launch = f"launch {place}/two.py --cpus-per-worker 2 --side-by-side 1 --runs {tmp_path}"
    stopped(spiketrain, [*launch.split(), "--name", "it"])
    assert "it: --cpus-per-worker was 2, is 1 from now on\n" in done(
        "resume", tmp_path / "it", "--cpus-per-worker", "1"
    )
    assert read_json(tmp_path / "it" / "suite.json")["cluster"]["cpus_per_worker"] == 1
    for run in runs_of(tmp_path / "it").values():
        assert read_json(run / "cluster.json")["cpus_per_worker"] == 1
        assert read_json(run / "job.json")["threads"] == 1


def test_a_run_that_has_begun_has_cores_of_its_own_where_those_do_that_begin_now(
    place: Path,
    tmp_path: Path,
    spiketrain: Command,
    done: Done,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped(spiketrain, words(place, tmp_path, "two.py"))
    runs = runs_of(tmp_path / "it").values()
    [begun] = [run for run in runs if run.exists()]
    write_job(replace(read_job(begun), own_cores=True))  # two had room for one another
    monkeypatch.setattr(Inline, "max_parallel_runs", lambda self: 1)
    done("resume", tmp_path / "it", "--side-by-side", "auto")
    assert [read_json(run / "job.json")["own_cores"] for run in runs] == [False, False]


def test_what_is_refused_changes_nothing(
    place: Path, tmp_path: Path, spiketrain: Command, refused: Refused
) -> None:
    stopped(spiketrain, words(place, tmp_path))
    before = {
        file: read_json(file)
        for file in (tmp_path / "it" / "cluster.json", tmp_path / "it" / "job.json")
    }
    for more, said in (
        (("--cpus-per-worker", "2"), "options of Ray must not be given; got --cpus-per-worker 2"),
        (("--side-by-side", "2"), "resume: --side-by-side must be 1 for one run; got 2 for it"),
        (("--workers", "3"), "batch_size must be divisible by 3 workers; got 8"),
        (
            ("--loader-threads", "no"),
            "resume: --loader-threads must be a number of threads or auto; got no",
        ),
    ):
        assert said in refused("resume", str(tmp_path / "it"), "--verify", "full", *more)
    assert {file: read_json(file) for file in before} == before


# ---------------------------------------------------------------------- other numbers of workers


MIXED = small_recipe(mixing=spec(Mixing, mixup=0.2))
PARENT = "a" * 32
LAUNCHED = Cluster(workers=4, device="cpu")
ODD = "Mixing: the size of a micro-batch must be even"


class Started(Exception):
    """A cluster was."""


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ray, "__enter__", Mock(side_effect=Started))


def test_a_run_is_checked_at_its_new_size(
    tmp_path: Path, spiketrain: Command, refused: Refused
) -> None:
    prepare(MIXED, LAUNCHED, tmp_path, name="it")
    resume = ("resume", "it", "--runs", str(tmp_path), "--workers")
    assert ODD in refused(*resume, "8")
    with pytest.raises(Started):
        spiketrain(*resume, "2")


def test_so_is_a_suites_that_has_begun(tmp_path: Path, refused: Refused) -> None:
    suite = SuiteFile(
        suite=Suite((MIXED,)).resolved(), runs=("one",), parent=PARENT, cluster=asdict(LAUNCHED)
    )
    prepare(MIXED, LAUNCHED, tmp_path, name="one", parent=PARENT, suite="it")
    (tmp_path / "it").mkdir()
    suite.write(tmp_path / "it")
    assert ODD in refused("resume", "it", "--runs", str(tmp_path), "--workers", "8")


@pytest.mark.parametrize(
    ("trainers", "is_refused"),
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
    trainers: tuple[dict[str, Any] | None, ...],
    is_refused: bool,
    tmp_path: Path,
    spiketrain: Command,
    refused: Refused,
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
    resume = ("resume", "it", "--runs", str(tmp_path), "--workers", "4")
    if is_refused:
        said = "resume: with ZeRO-2, --workers must be 2, as at the newest checkpoint; got 4"
        assert refused(*resume) == said
    else:
        with pytest.raises(Started):
            spiketrain(*resume)
