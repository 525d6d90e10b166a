"""Commands that are printed have all the words that they need."""

import json
from pathlib import Path

import pytest

from pipeline.recipe.command_line import command, how_to_resume


def test_a_command_has_the_folder_of_runs_the_cluster_and_the_trusted_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for runs in ("runs", "other runs"):
        (tmp_path / runs / "it").mkdir(parents=True)
        packages = {name: {"folder": "/lab", "files": {}} for name in ("mysnn", "lab.own")}
        (tmp_path / runs / "it" / "code.json").write_text(json.dumps(packages))
    assert (
        command("resume", Path("runs/it"), address="auto")
        == "spiketrain resume it --address auto --trust mysnn --trust lab.own"
    )
    assert (
        command("export", tmp_path / "runs" / "it")
        == "spiketrain export it --trust mysnn --trust lab.own"
    )
    assert (
        command("compare", Path("other runs/it"))
        == "spiketrain compare it --runs 'other runs' --trust mysnn --trust lab.own"
    )
    (tmp_path / "runs" / "it" / "code.json").unlink()
    assert command("report", Path("runs/it")) == "spiketrain report it"
    assert command("report", Path("runs/none")) == "spiketrain report none"


def test_a_list_shows_a_placeholder_for_the_cluster_that_a_folder_must_not_name(
    tmp_path: Path,
) -> None:
    (tmp_path / "cluster.json").write_text(json.dumps({"address": "10.0.0.1:6379"}))
    assert (
        how_to_resume(tmp_path)
        == f"spiketrain resume {tmp_path.name} --runs {tmp_path.parent} --address ADDRESS"
    )
    (tmp_path / "suite.json").write_text(json.dumps({"cluster": {"address": None}}))
    assert how_to_resume(tmp_path) == f"spiketrain resume {tmp_path.name} --runs {tmp_path.parent}"
    (tmp_path / "suite.json").write_text("{")
    assert how_to_resume(tmp_path) == f"spiketrain resume {tmp_path.name} --runs {tmp_path.parent}"
