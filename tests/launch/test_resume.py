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
from typing import Any, NoReturn

import pytest

from pipeline.data.mixing import Mixing
from pipeline.launch.cluster import Cluster
from pipeline.launch.in_process import Inline
from pipeline.launch.prepare import prepare, read_job, write_job
from pipeline.launch.ray import Ray
from pipeline.recipe.recipe import spec
from pipeline.recipe.suite import Suite, SuiteFile, runs_of
from pipeline.track.journal import read
from pipeline.track.state import state_of
from pipeline.train.trainer import Trainer
from tests.helpers.small import Command, command, same_weights, small_recipe

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


spiketrain = pytest.fixture(command)


def words(place: Path, runs: Path, file: str = "one.py", name: str = "it") -> list[str]:
    return [
        "launch",
        str(place / file),
        "--inline",
        "--device",
        "cpu",
        "--runs",
        str(runs),
        "--name",
        name,
        "--or-resume",
    ]


def stopped_at(patch: pytest.MonkeyPatch, step: int) -> None:
    original = Trainer._micro_batches

    def micro_batches(self: Trainer, source):
        if self.step == step:
            (self.folder / "stop").touch()
        return original(self, source)

    patch.setattr(Trainer, "_micro_batches", micro_batches)


def test_the_same_words_begin_go_on_and_end(
    place: Path, tmp_path: Path, spiketrain: Command
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(patch, 3)
        assert spiketrain(*words(place, tmp_path))[0] == 130
    assert state_of(tmp_path / "it") == "stopped"
    code, said, _ = spiketrain(*words(place, tmp_path), "--verify", "full")
    assert code == 0 and said.startswith("it: --verify was sampled, is full from here on\n")
    assert [told(tmp_path / "it", file)["verify"] for file in ("cluster.json", "job.json")] == [
        "full"
    ] * 2
    assert [
        event["step"]
        for event in read(tmp_path / "it" / "journal.jsonl")
        if event["event"] == "start"
    ] == [0, 4]
    code, said, _ = spiketrain(*words(place, tmp_path))
    assert code == 0 and said.startswith("it has finished")
    assert spiketrain(*words(place, tmp_path, name="whole"))[0] == 0
    assert same_weights(tmp_path / "it", tmp_path / "whole")


def test_a_suite_goes_on_where_it_stopped(place: Path, tmp_path: Path, spiketrain: Command) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(patch, 3)
        assert spiketrain(*words(place, tmp_path, "two.py"))[0] == 130
    code, said, error = spiketrain(*words(place, tmp_path, "two.py"))
    assert code == 0, error
    assert "other" in said and "it has finished" in spiketrain(*words(place, tmp_path, "two.py"))[1]
    code, _, error = spiketrain(*words(place, tmp_path, "two.py"), "--set", "optimizer.lr=0.25")
    assert (
        code == 2
        and "continues it as it was launched; its recipe differs now: other.optimizer.lr: " in error
    )
    code, _, error = spiketrain(*words(place, tmp_path))
    assert code == 2 and error.endswith("it is a suite, and now one recipe is asked for\n")


def test_another_recipe_is_refused_with_the_fields_that_differ(
    place: Path, tmp_path: Path, spiketrain: Command
) -> None:
    assert spiketrain(*words(place, tmp_path))[0] == 0
    code, _, error = spiketrain(
        *words(place, tmp_path), "--set", "optimizer.lr=0.25", "--set", "seed=7"
    )
    assert code == 2
    assert error.startswith(
        "launch: --or-resume continues it as it was launched; its recipe differs now: "
    )
    assert error.endswith("optimizer.lr: 0.1 and 0.25; seed: 0 and 7\n")
    code, _, error = spiketrain(*words(place, tmp_path, "two.py"))
    assert code == 2 and error.endswith("it is one run, and now a suite is asked for\n")


@pytest.mark.parametrize("written", ["[]", '{"version": 1}', '{"version": 1, "recipe": []}'])
def test_a_recipe_json_without_a_recipe_is_refused_in_one_line(
    place: Path, tmp_path: Path, spiketrain: Command, written: str
) -> None:
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "recipe.json").write_text(written)
    code, _, error = spiketrain(*words(place, tmp_path))
    assert (
        code == 2
        and error.startswith(f"{tmp_path}/it/recipe.json: must hold a recipe; got ")
        and error.count("\n") == 1
    )


def test_what_only_a_launch_can_say_is_refused_and_the_rest_is_not(
    place: Path, tmp_path: Path, spiketrain: Command
) -> None:
    assert spiketrain(*words(place, tmp_path))[0] == 0
    elsewhere = str(tmp_path / "elsewhere")
    code, _, error = spiketrain(
        *words(place, tmp_path), "--checkpoints", elsewhere, "--loader-threads", "2"
    )
    assert code == 2 and len(error.splitlines()) == 1
    assert error.endswith(f"its options differ now: --checkpoints was None, is {elsewhere}\n")
    assert spiketrain(
        *[word for word in words(place, tmp_path) if word != "--inline"],
        "--workers",
        "2",
        "--loader-threads",
        "2",
    )[1].startswith("it has finished")


def test_it_needs_a_name(place: Path, tmp_path: Path, spiketrain: Command) -> None:
    asked = words(place, tmp_path)
    del asked[asked.index("--name") : asked.index("--name") + 2]
    code, _, error = spiketrain(*asked)
    assert (code, error) == (2, "launch: --or-resume needs a --name to continue; got none\n")


# ----------------------------------------------------------------------- a machine of another shape


def told(folder: Path, file: str) -> Any:
    return json.loads((folder / file).read_text())


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[Cluster]:
    """What each launcher is made of. They train in this process: no Ray is started."""
    made: list[Cluster] = []

    def launcher(self: Cluster) -> Inline:
        made.append(self)
        return Inline(device="cpu")

    monkeypatch.setattr(Cluster, "launcher", launcher)
    return made


def test_a_run_goes_on_with_fewer_cores_and_keeps_what_nobody_changes(
    place: Path, tmp_path: Path, spiketrain: Command, trained_on: list[Cluster]
) -> None:
    launch = (
        "launch",
        str(place / "one.py"),
        "--cpus-per-worker",
        "2",
        "--verify",
        "full",
        *(("--runs", str(tmp_path), "--name", "it")),
    )
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(patch, 3)
        assert spiketrain(*launch)[0] == 130
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(patch, 5)
        code, said, error = spiketrain(
            "resume", str(tmp_path / "it"), "--cpus-per-worker", "1", "--hang-minutes", "5"
        )
    assert code == 130, error
    assert said.startswith(
        "it: --cpus-per-worker was 2, is 1, --hang-minutes was 30.0, is 5.0 from here on\n"
    )
    job = told(tmp_path / "it", "job.json")
    assert (job["threads"], job["hang_minutes"], job["verify"]) == (1, 5.0, "full")
    code, said, error = spiketrain("resume", str(tmp_path / "it"))
    assert code == 0 and "from here on" not in said, error
    assert [(each.cpus_per_worker, each.hang_minutes, each.verify) for each in trained_on] == [
        (2, 30.0, "full"),
        (1, 5.0, "full"),
        (1, 5.0, "full"),
    ]


def test_a_suite_goes_on_with_fewer_cores_in_the_run_that_has_begun_and_in_the_next(
    place: Path, tmp_path: Path, spiketrain: Command, trained_on: list[Cluster]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(patch, 3)
        assert (
            spiketrain(
                *(
                    (
                        "launch",
                        str(place / "two.py"),
                        "--cpus-per-worker",
                        "2",
                        "--runs",
                        str(tmp_path),
                        "--name",
                        "it",
                    )
                ),
                "--side-by-side",
                "1",
            )[0]
            == 130
        )
    code, said, error = spiketrain("resume", str(tmp_path / "it"), "--cpus-per-worker", "1")
    assert code == 0 and "it: --cpus-per-worker was 2, is 1 from here on\n" in said, error
    assert told(tmp_path / "it", "suite.json")["cluster"]["cpus_per_worker"] == 1
    for run in runs_of(tmp_path / "it").values():
        assert told(run, "cluster.json")["cpus_per_worker"] == told(run, "job.json")["threads"] == 1


def test_a_run_that_has_begun_has_cores_of_its_own_where_those_do_that_begin_now(
    place: Path, tmp_path: Path, spiketrain: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = (
        "launch",
        str(place / "two.py"),
        "--inline",
        "--device",
        "cpu",
        "--runs",
        str(tmp_path),
        "--name",
        "it",
    )
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(patch, 3)
        assert spiketrain(*launch)[0] == 130
    [begun] = [run for run in runs_of(tmp_path / "it").values() if run.exists()]
    write_job(replace(read_job(begun), own_cores=True))  # two had room for one another
    monkeypatch.setattr(Inline, "room", lambda self: 1)
    code, _, error = spiketrain("resume", str(tmp_path / "it"), "--side-by-side", "auto")
    assert code == 0, error
    assert [told(run, "job.json")["own_cores"] for run in runs_of(tmp_path / "it").values()] == [
        False,
        False,
    ]


def test_what_is_refused_changes_nothing(place: Path, tmp_path: Path, spiketrain: Command) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(patch, 3)
        assert spiketrain(*words(place, tmp_path))[0] == 130
    before = {file: told(tmp_path / "it", file) for file in ("cluster.json", "job.json")}
    for more, said in (
        (("--cpus-per-worker", "2"), "without Ray; got --cpus-per-worker 2"),
        (("--side-by-side", "2"), "resume: --side-by-side is for a suite; got 2 with it alone"),
        (("--workers", "3"), "batch_size must divide by 3 workers; got 8"),
        (
            ("--loader-threads", "no"),
            "resume: --loader-threads must be a number of threads or auto; got no",
        ),
    ):
        code, _, error = spiketrain("resume", str(tmp_path / "it"), "--verify", "full", *more)
        assert code == 2 and said in error and error.count("\n") == 1, error
    assert {file: told(tmp_path / "it", file) for file in before} == before


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
