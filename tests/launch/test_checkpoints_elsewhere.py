"""`launch --checkpoints`: beneath another folder, found again by every command, and gone on with
where a run's folder is lost.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from pipeline.recipe.recipe import Policy, read_json, write_json
from pipeline.track.mlflow_store import connect
from pipeline.train.checkpoint import claim, step_folders, store_at
from pipeline.train.recovery import Decisions
from pipeline.train.trainer import Trainer
from pipeline.train.weights import load_run
from tests.faults.test_not_finite import hit
from tests.faults.test_out_of_memory import room_for
from tests.helpers.interruptions import before_batch, between_batches
from tests.helpers.s3 import s3_server
from tests.helpers.small import (
    Command,
    Done,
    Refused,
    events,
    same_weights,
    small_recipe,
    steps_of,
    train_inline,
)

pytestmark = pytest.mark.timeout(120)

Words = Callable[..., list[str]]

RECIPE = """
from tests.helpers.small import small_recipe

def recipe():
    return small_recipe(epochs=1)
"""


@pytest.fixture
def run(tmp_path: Path, own_store: str) -> Callable[..., list[str]]:
    """The words that launch the recipe as "run", with its checkpoints beneath `elsewhere`."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    words = ("launch", str(tmp_path / "recipe.py"), "--inline", "--name", "run", "--runs")
    return lambda runs, *more, elsewhere=tmp_path / "elsewhere": [
        *(*words, str(tmp_path / runs), "--checkpoints", str(elsewhere), *more)
    ]


def test_they_are_there_and_a_run_whose_folder_is_lost_goes_on_with_them(
    tmp_path: Path, run: Words, done: Done, refused: Refused
) -> None:
    one, third, address = (tmp_path / name / "run" for name in ("one", "third", "elsewhere"))
    done(*run("one"))
    assert newest(address) == "step_00000008" and not (one / "checkpoints").exists()
    assert load_run(one).state_dict()
    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    [tracked] = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert tracked.data.tags["spiketrain.checkpoint"] == (address / "step_00000008").as_uri()

    assert refused(*run("other")) == (
        f"launch: {address} must have no checkpoints and no owner; got step_00000008: choose"
        " another --name, or continue with --or-resume"
    )
    assert not (tmp_path / "other" / "run").exists()
    error = refused(*run("other", "--or-resume", "--set", "optimizer.lr=0.05"))
    assert error.startswith("launch: --or-resume continues from checkpoints of the same study; got")

    (address / "step_00000009").mkdir()  # it is moved away as damaged, and stands in no way
    (address / "step_00000009" / "trainer.json").write_text("[]")
    done(*run("third", "--or-resume"))
    [start] = events(third, "start")
    run_id = read_json(one / "job.json")["run_id"]
    assert (start["step"], start["run_id"]) == (8, run_id)
    assert "store_token" not in read_json(third / "job.json")  # of one start of its driver
    owner = read_json(address / "owner.json")
    assert (owner["run_id"], owner["run"]) == (run_id, str(third))
    assert same_weights(one, third)


def newest(address: Path) -> str:
    return step_folders(address)[-1].name


def test_what_a_run_has_decided_outlives_its_folder(
    tmp_path: Path,
    run: Words,
    spiketrain: Command,
    done: Done,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory ran out, and batch 5 led back to step 3; the folder is lost after step 4, among the
    batches to be skipped.
    """
    one, other, elsewhere = (tmp_path / name / "run" for name in ("one", "other", "elsewhere"))
    changes = ("--set", "policy.max_skips=0", "--set", "policy.max_rollbacks=1")

    def stop(trainer: Trainer) -> None:
        if trainer.context.decisions.rollbacks:
            (trainer.folder / "stop").touch()

    hit(monkeypatch, {5})
    with monkeypatch.context() as patch:
        room_for(patch, 4)
        between_batches(patch, stop, step=4)
        code, _, said = spiketrain(*run("one", *changes))
    assert code == 130, said
    assert newest(elsewhere) == "step_00000004"
    shutil.rmtree(one)
    done(*run("other", *changes, "--or-resume"))
    [start] = events(other, "start")
    assert (start["step"], start["micro_batch"]) == (4, 4)
    assert steps_of(other, "skipped") == [4, 5]
    assert Decisions.read(other) == Decisions(1, ((3, 6),), micro_batch=4)
    said = small_recipe(epochs=1, micro_batch=4, policy=Policy(skip=((3, 6),)))
    train_inline(tmp_path / "told", said)
    assert same_weights(other, tmp_path / "told")


def test_a_run_whose_folder_names_anothers_place_is_not_gone_on_with_and_nothing_is_touched(
    tmp_path: Path, run: Words, done: Done, refused: Refused
) -> None:
    done(*run("one"))
    theirs, foreign = tmp_path / "elsewhere" / "run", tmp_path / "foreign" / "run"
    (theirs / ".writing-now").mkdir()
    shutil.copytree(tmp_path / "one" / "run", foreign)
    for file in ("summary.json", "journal.jsonl"):
        (foreign / file).unlink()
    job = read_json(foreign / "job.json")
    for has_owner in (True, False):
        if not has_owner:  # its checkpoints tell
            (theirs / "owner.json").unlink()
        write_json(foreign / "job.json", {**job, "run_id": "f" * 32, "suite": None})
        before = {file: file.stat().st_mtime_ns for file in (theirs, *theirs.rglob("*"))}
        said = refused("resume", "run", "--inline", "--runs", foreign.parent)
        assert said.startswith(
            f"checkpoints: {theirs} must belong to run ffffffff ({foreign}); it belongs to run "
        )
        assert {file: file.stat().st_mtime_ns for file in (theirs, *theirs.rglob("*"))} == before


def test_a_place_whose_run_has_not_saved_yet_is_that_runs_all_the_same(
    tmp_path: Path, run: Words, refused: Refused
) -> None:
    address = tmp_path / "elsewhere" / "run"
    token = claim(
        store_at(str(address), tmp_path / "theirs"), run="theirs", run_id="a" * 32, study="another"
    )
    assert refused(*run("runs")).startswith(
        f"launch: {address} must have no checkpoints and no owner; got the store of run aaaaaaaa"
    )
    assert refused(*run("runs", "--or-resume")) == (
        "launch: --or-resume continues from checkpoints of the same study; got another in"
        f" {address}"
    )
    assert read_json(address / "owner.json")["token"] == token
    assert not (tmp_path / "runs" / "run").exists()


@pytest.mark.parametrize(
    ("elsewhere", "said"),
    [
        (
            "nowhere://x",
            (
                "checkpoints: an address must be one that fsspec can open; got nowhere://x/run:"
                " Protocol not known"
            ),
        ),
        (
            "s3://key:secret@bucket",
            (
                "checkpoints: an address must hold no credentials, also not in a query: set"
                " credentials in environment variables"
            ),
        ),
        (
            "simplecache::memory://user:secret@bucket",
            (
                "checkpoints: an address must be of one store, without fsspec's '::'; got a chain"
                " of several"
            ),
        ),
    ],
)
def test_what_cannot_be_opened_is_refused_before_anything_is_left_behind(
    tmp_path: Path, run: Words, refused: Refused, elsewhere: str, said: str
) -> None:
    assert refused(*run("runs", elsewhere=elsewhere)).startswith(said)
    assert not (tmp_path / "runs" / "run").exists()


# Storage that does not answer would be waited for.
@pytest.mark.parametrize(
    ("key", "got"),
    [(None, "Unable to locate credentials"), ("testing", "missing: AWS_SECRET_ACCESS_KEY")],
)
def test_a_run_whose_credentials_are_not_at_hand_asks_for_them_at_once(
    tmp_path: Path,
    run: Words,
    monkeypatch: pytest.MonkeyPatch,
    spiketrain: Command,
    refused: Refused,
    key: str | None,
    got: str,
) -> None:
    with s3_server() as bucket:
        with monkeypatch.context() as patch:
            before_batch(patch, lambda trainer: (trainer.folder / "stop").touch(), step=0)
            code, _, said = spiketrain(*run("runs", elsewhere=f"{bucket}/{key}"))
        assert code == 130, said
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        if key is not None:
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        S3FileSystem.clear_instance_cache()
        begun = time.monotonic()
        said = refused("resume", "run", "--inline", "--runs", tmp_path / "runs")
    rule = "checkpoints: the environment must hold credentials (AWS_ACCESS_KEY_ID, ...): "
    assert said.startswith(rule) and said.endswith(got)
    assert time.monotonic() - begun < 60
