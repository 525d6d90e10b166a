"""`launch --or-resume`: the words that a scheduler says again each time go on with what has begun, if it is still the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.attempt import Attempt
from pipeline.track.jsonl import read
from pipeline.track.state import state_of
from tests.small import Command, command, same_weights

pytestmark = pytest.mark.timeout(120)  # a few runs and a new MLflow store

ONE = """
from tests.small import small_recipe

def recipe():
    return small_recipe(name="one", epochs=1)
"""
TWO = ONE.replace("return small_recipe(", "return small_recipe(name='other', epochs=1), small_recipe(")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("again")
    (folder / "one.py").write_text(ONE)
    (folder / "two.py").write_text(TWO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        yield folder


spiketrain = pytest.fixture(command)


def words(place: Path, runs: Path, file: str = "one.py", name: str = "it") -> list[str]:
    return ["launch", str(place / file), "--inline", "--device", "cpu", "--runs", str(runs), "--name", name, "--or-resume"]


def stopped_at(patch: pytest.MonkeyPatch, step: int) -> None:
    original = Attempt._micro_batches

    def micro_batches(self: Attempt, source):
        if self.step == step:
            (self.folder / "stop").touch()
        return original(self, source)

    patch.setattr(Attempt, "_micro_batches", micro_batches)


def test_the_same_words_begin_go_on_and_end(place: Path, tmp_path: Path, spiketrain: Command) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(patch, 3)
        assert spiketrain(*words(place, tmp_path))[0] == 130
    assert state_of(tmp_path / "it") == "stopped"
    assert spiketrain(*words(place, tmp_path))[0] == 0
    assert [event["step"] for event in read(tmp_path / "it" / "journal.jsonl") if event["event"] == "start"] == [0, 4]
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
    assert code == 2 and "goes on with it as it was launched; its recipe differs now: other.optimizer.lr: " in error
    code, _, error = spiketrain(*words(place, tmp_path))
    assert code == 2 and error.endswith("it is a suite, and now one recipe is asked for\n")


def test_another_recipe_is_refused_with_the_fields_that_differ(place: Path, tmp_path: Path, spiketrain: Command) -> None:
    assert spiketrain(*words(place, tmp_path))[0] == 0
    code, _, error = spiketrain(*words(place, tmp_path), "--set", "optimizer.lr=0.25", "--set", "seed=7")
    assert code == 2
    assert error.startswith("launch: --or-resume goes on with it as it was launched; its recipe differs now: ")
    assert error.endswith("optimizer.lr: 0.1 and 0.25; seed: 0 and 7\n")
    code, _, error = spiketrain(*words(place, tmp_path, "two.py"))
    assert code == 2 and error.endswith("it is one run, and now a suite is asked for\n")


def test_other_options_are_refused_where_they_would_have_no_effect(place: Path, tmp_path: Path, spiketrain: Command) -> None:
    """But for where, and on how many workers, it goes on."""
    assert spiketrain(*words(place, tmp_path))[0] == 0
    code, _, error = spiketrain(*words(place, tmp_path), "--verify", "full", "--loader-threads", "2")
    assert code == 2 and len(error.splitlines()) == 1
    assert error.endswith("its options differ now: --loader-threads was 1, is 2, --verify was sampled, is full\n")
    ours = [word for word in words(place, tmp_path) if word != "--inline"]
    assert spiketrain(*ours, "--workers", "2")[1].startswith("it has finished")


def test_it_needs_a_name(place: Path, tmp_path: Path, spiketrain: Command) -> None:
    asked = words(place, tmp_path)
    del asked[asked.index("--name") : asked.index("--name") + 2]
    code, _, error = spiketrain(*asked)
    assert (code, error) == (2, "launch: --or-resume goes on with what has this --name; got none\n")
