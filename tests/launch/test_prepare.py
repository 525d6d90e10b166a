"""A launch that is killed leaves a run that can be resumed, or none."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.launch import prepare as preparing
from pipeline.launch.cluster import Cluster
from pipeline.launch.prepare import atomic_folder, prepare, read_job
from pipeline.report.selection import list_runs
from pipeline.track.run_state import state_of
from tests.helpers.interruptions import Killed, die
from tests.helpers.small import small_recipe

CLUSTER = Cluster(inline=True, loader_threads=2)


@pytest.mark.parametrize("tidies", [True, False], ids=["Ctrl-C", "kill"])
@pytest.mark.parametrize("file", ["recipe.json", "cluster.json", "job.json"])
def test_killed_while_the_folder_is_made_there_is_none(
    file: str, tidies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = preparing.write_json

    def write_or_die(path: Path, value: Any) -> None:
        if path.name == file:
            die()
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "write_json", write_or_die)
        if not tidies:
            patch.setattr("shutil.rmtree", lambda path, **how: None)
        with pytest.raises(Killed):
            prepare(small_recipe(), CLUSTER, tmp_path, name="run")
    assert list_runs(tmp_path) == [] and len(list(tmp_path.iterdir())) == (not tidies)
    assert Path(prepare(small_recipe(), CLUSTER, tmp_path, name="run").run) == tmp_path / "run"


def test_from_its_first_moment_a_run_says_where_and_on_how_much_it_trains(tmp_path: Path) -> None:
    job = prepare(
        small_recipe(),
        Cluster(workers=2, cpus_per_worker=3, loader_threads=2),
        tmp_path,
        name="run",
    )
    assert read_job(tmp_path / "run") == job and (job.threads, job.loader_threads) == (3, 2)
    assert json.loads((tmp_path / "run" / "cluster.json").read_text())["workers"] == 2
    assert state_of(tmp_path / "run") == "new"
    with pytest.raises(
        ValueError, match=rf"got run, which `spiketrain resume run --runs {tmp_path}` continues$"
    ):
        prepare(small_recipe(), CLUSTER, tmp_path, name="run")


def test_a_name_that_another_launch_takes_meanwhile_is_refused(tmp_path: Path) -> None:
    def launched_beside_another() -> None:
        with atomic_folder(tmp_path / "run") as hidden:
            (hidden / "mine").touch()
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "theirs").touch()

    with pytest.raises(ValueError, match="got run, which"):
        launched_beside_another()
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "theirs"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "needs study, data_fingerprint, commit, recipe; got no study"),
        ({"hosts": 1}, "unknown field 'hosts'; it has study, "),
        ({"run": "/elsewhere"}, "unknown field 'run'; it has study, "),
        ({"threads": "many"}, "threads must be int; got 'many'"),
        (
            {"hang_minutes": 1e9},
            "hang_minutes must be in 0..10080 (a week; 0 means never); got 1e+09",
        ),
        ({"loader_threads": 0}, "loader_threads must be a whole number >= 1; got loader_threads=0"),
    ],
)
def test_a_damaged_job_is_refused_in_one_line(
    change: dict[str, Any] | None, said: str, tmp_path: Path
) -> None:
    prepare(small_recipe(), CLUSTER, tmp_path, name="run")
    file = tmp_path / "run" / "job.json"
    file.write_text(json.dumps({} if change is None else json.loads(file.read_text()) | change))
    with pytest.raises(ValueError) as refusal:
        read_job(tmp_path / "run")
    assert str(refusal.value).startswith(f"{file}: {said}") and "\n" not in str(refusal.value)
