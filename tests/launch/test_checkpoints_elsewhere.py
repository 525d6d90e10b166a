"""`launch --checkpoints`: beneath another folder, found again by every command, and gone on with
where a run's folder is lost.
"""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

from pipeline.recipe.recipe import Policy, read_json, write_json
from pipeline.track.connect import connect
from pipeline.track.journal import read
from pipeline.train.checkpoint import claim, place_at, step_folders
from pipeline.train.recovery import Decisions
from pipeline.train.trainer import Trainer
from pipeline.train.weights import load_run
from tests.faults.test_not_finite import hit
from tests.faults.test_out_of_memory import room_for
from tests.helpers.s3 import s3_server
from tests.helpers.small import Command, command, same_weights, small_recipe, train_inline

pytestmark = pytest.mark.timeout(120)

RECIPE = """
from tests.helpers.small import small_recipe

def recipe():
    return small_recipe(epochs=1)
"""


@pytest.fixture
def run(tmp_path: Path, own_store: str, spiketrain: Command) -> Command:
    """`spiketrain launch` of the recipe as "run", with its checkpoints beneath `elsewhere`."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    words = ("launch", str(tmp_path / "recipe.py"), "--inline", "--name", "run")
    return lambda *more, elsewhere=str(tmp_path / "elsewhere"): spiketrain(
        *words, "--checkpoints", elsewhere, *more
    )


def test_they_are_there_and_a_run_whose_folder_is_lost_goes_on_with_them(
    tmp_path: Path, run: Command
) -> None:
    one, other, third = (("--runs", str(tmp_path / name)) for name in ("one", "other", "third"))
    code, _, said = run(*one)
    assert code == 0, said
    assert [path.name for path in step_folders(tmp_path / "elsewhere" / "run")][
        -1
    ] == "step_00000008" and not (tmp_path / "one" / "run" / "checkpoints").exists()
    assert load_run(tmp_path / "one" / "run").state_dict()
    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    [tracked] = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert (
        tracked.data.tags["spiketrain.checkpoint"]
        == (tmp_path / "elsewhere" / "run" / "step_00000008").as_uri()
    )

    code, _, said = run(*other)
    assert code == 2 and not (tmp_path / "other" / "run").exists()
    address = tmp_path / "elsewhere" / "run"
    assert (
        said.strip()
        == f"launch: {address} must hold no checkpoints yet; got step_00000008: another --name, or"
        " --or-resume to continue from them"
    )
    code, _, said = run(*other, "--or-resume", "--set", "optimizer.lr=0.05")
    assert code == 2 and said.startswith(
        "launch: --or-resume continues from checkpoints of the same study; got "
    )

    (address / "step_00000009").mkdir()  # it is moved away as damaged, and stands in no way
    (address / "step_00000009" / "trainer.json").write_text("[]")
    code, _, said = run(*third, "--or-resume")
    assert code == 0, said
    [start] = [
        event
        for event in read(tmp_path / "third" / "run" / "journal.jsonl")
        if event["event"] == "start"
    ]
    assert (
        start["step"] == 8
        and start["run_id"] == read_json(tmp_path / "one" / "run" / "job.json")["run_id"]
    )
    assert "place_token" not in read_json(
        tmp_path / "third" / "run" / "job.json"
    )  # of one start of its driver
    owner = read_json(address / "owner.json")
    assert (owner["run_id"], owner["run"]) == (start["run_id"], str(tmp_path / "third" / "run"))
    assert same_weights(tmp_path / "one" / "run", tmp_path / "third" / "run")


def test_what_a_run_has_decided_outlives_its_folder(
    tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory ran out, and batch 5 led back to step 3; the folder is lost after step 4, among the
    batches to be skipped.
    """
    one, other = tmp_path / "one" / "run", tmp_path / "other" / "run"
    changes = ("--set", "policy.max_skips=0", "--set", "policy.max_rollbacks=1")
    between = Trainer._between_batches

    def stopped(self: Trainer, epoch: int, *, last: bool) -> None:
        if self.step == 4 and self.context.decisions.rollbacks:
            (self.folder / "stop").touch()
        between(self, epoch, last=last)

    hit(monkeypatch, {5})
    with monkeypatch.context() as patch:
        room_for(patch, 4)
        patch.setattr(Trainer, "_between_batches", stopped)
        code, _, said = run("--runs", str(one.parent), *changes)
    assert code == 130, said
    assert [path.name for path in step_folders(tmp_path / "elsewhere" / "run")][
        -1
    ] == "step_00000004"
    shutil.rmtree(one)
    code, _, said = run("--runs", str(other.parent), *changes, "--or-resume")
    assert code == 0, said
    events = read(other / "journal.jsonl")
    assert [
        (event["step"], event["micro_batch"]) for event in events if event["event"] == "start"
    ] == [(4, 4)]
    assert [event["step"] for event in events if event["event"] == "skipped"] == [4, 5]
    assert Decisions.read(other) == Decisions(1, ((3, 6),), micro_batch=4)
    train_inline(
        tmp_path / "told", small_recipe(epochs=1, micro_batch=4, policy=Policy(skip=((3, 6),)))
    )
    assert same_weights(other, tmp_path / "told")


def test_a_driver_whose_place_another_has_taken_over_ends_at_its_next_save(
    tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by the same launch with --or-resume where the folder of runs is another, or by a copy of
    the run's folder.
    """
    address, original = tmp_path / "elsewhere" / "run", Trainer._micro_batches

    def micro_batches(self: Trainer, source: Any) -> Any:
        if self.step == 4:
            self.saving.wait(4)
            job = self.job
            claim(
                place_at(job.checkpoints, tmp_path / "other"),
                run="other",
                run_id=job.run_id,
                study=job.study,
            )
            (address / ".writing-other").mkdir()
        return original(self, source)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_micro_batches", micro_batches)
        code, _, said = run("--runs", str(tmp_path / "one"), "--set", "checkpoints.keep=1")
    assert (code, len(said.strip().splitlines())) == (2, 1)
    assert said.startswith(
        f"checkpoint: cannot be written after step 6: checkpoints: the owner of {address} must be"
        " this driver"
    )
    assert said.strip().endswith(
        f"it writes nothing more there; the newest whole one is {address}/step_00000003"
    )
    assert {path.name for path in address.iterdir()} == {
        "owner.json",
        "step_00000003",
        ".writing-other",
    }
    assert [
        event["step"]
        for event in read(tmp_path / "one" / "run" / "journal.jsonl")
        if event["event"] == "checkpoint"
    ] == [3]

    code, _, said = run(
        "--runs", str(tmp_path / "one"), "--set", "checkpoints.keep=1", "--or-resume"
    )  # whoever begins last has it
    assert code == 0, said
    assert {path.name for path in address.iterdir()} == {"owner.json", "step_00000008"}


def test_a_run_whose_folder_names_anothers_place_is_not_gone_on_with_and_nothing_is_touched(
    tmp_path: Path,
    run: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, said = run("--runs", str(tmp_path / "one"))
    assert code == 0, said
    theirs, foreign = tmp_path / "elsewhere" / "run", tmp_path / "foreign" / "run"
    (theirs / ".writing-now").mkdir()
    shutil.copytree(tmp_path / "one" / "run", foreign)
    (foreign / "summary.json").unlink()
    (foreign / "journal.jsonl").unlink()
    for has_owner in (True, False):
        if not has_owner:  # its checkpoints tell
            (theirs / "owner.json").unlink()
        write_json(
            foreign / "job.json",
            {**read_json(foreign / "job.json"), "run_id": "f" * 32, "suite": None},
        )
        before = {file: file.stat().st_mtime_ns for file in (theirs, *theirs.rglob("*"))}
        code, _, said = command(monkeypatch, capsys)(
            "resume", "run", "--inline", "--runs", str(foreign.parent)
        )
        assert (code, len(said.strip().splitlines())) == (2, 1)
        assert said.startswith(
            f"checkpoints: {theirs} must be of run ffffffff ({foreign}); got those of run "
        )
        assert {file: file.stat().st_mtime_ns for file in (theirs, *theirs.rglob("*"))} == before


def test_a_place_whose_run_has_not_saved_yet_is_that_runs_all_the_same(
    tmp_path: Path, run: Command
) -> None:
    address = tmp_path / "elsewhere" / "run"
    token = claim(
        place_at(str(address), tmp_path / "theirs"), run="theirs", run_id="a" * 32, study="another"
    )
    code, _, said = run("--runs", str(tmp_path / "runs"))
    assert code == 2 and said.startswith(
        f"launch: {address} must hold no checkpoints yet; got those to come of run aaaaaaaa"
    )
    code, _, said = run("--runs", str(tmp_path / "runs"), "--or-resume")
    assert (code, said.strip()) == (
        2,
        (
            "launch: --or-resume continues from checkpoints of the same study; got another in"
            f" {address}"
        ),
    )
    assert (
        read_json(address / "owner.json")["token"] == token
        and not (tmp_path / "runs" / "run").exists()
    )


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
                "checkpoints: an address holds no credentials, which are the environment's; got one"
                " with some"
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
    tmp_path: Path, run: Command, elsewhere: str, said: str
) -> None:
    code, _, told = run("--runs", str(tmp_path / "runs"), elsewhere=elsewhere)
    assert (code, len(told.strip().splitlines())) == (2, 1) and told.startswith(said)
    assert not (tmp_path / "runs" / "run").exists()


@pytest.mark.parametrize(
    ("key", "got"),
    [(None, "Unable to locate credentials"), ("testing", "missing: AWS_SECRET_ACCESS_KEY")],
)
def test_a_run_whose_credentials_are_not_at_hand_asks_for_them_at_once(
    tmp_path: Path,
    run: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str | None,
    got: str,
) -> None:
    """Storage that does not answer would be waited for."""
    resume, train, words = (
        command(monkeypatch, capsys),
        Trainer._train,
        ("--runs", str(tmp_path / "runs")),
    )
    with s3_server() as bucket:
        with monkeypatch.context() as patch:
            patch.setattr(
                Trainer,
                "_train",
                lambda attempt: (attempt.folder / "stop").touch() or train(attempt),
            )
            code, _, said = run(*words, elsewhere=f"{bucket}/{key}")
        assert code == 130, said
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        if key is not None:
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        S3FileSystem.clear_instance_cache()
        begun = time.monotonic()
        code, _, said = resume("resume", "run", "--inline", *words)
        assert code == 2 and said.startswith(
            "checkpoints: the environment must hold credentials (AWS_ACCESS_KEY_ID, ...): "
        )
        assert said.endswith(f"{got}\n") and said.count("\n") == 1
        assert time.monotonic() - begun < 60
