"""Commands that are printed have all the words that they need."""

import json
from pathlib import Path

import pytest

from pipeline.recipe.suite import command, how_to_resume


def test_a_command_has_the_folder_of_runs_the_cluster_and_the_trusted_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for runs in ("runs", "other runs"):
        (tmp_path / runs / "it").mkdir(parents=True)
        folders = dict.fromkeys(("mysnn", "lab.own"), "/lab")
        (tmp_path / runs / "it" / "code.json").write_text(json.dumps(folders))
    trust = "--trust mysnn --trust lab.own"
    for words, expected in (
        (command("resume", Path("runs/it"), address="auto"), f"resume it --address auto {trust}"),
        (command("export", tmp_path / "runs" / "it"), f"export it {trust}"),
        (command("compare", Path("other runs/it")), f"compare it --runs 'other runs' {trust}"),
        (command("report", Path("runs/none")), "report none"),
    ):
        assert words == f"spiketrain {expected}"


def test_a_list_shows_a_placeholder_for_the_cluster_that_a_folder_must_not_name(
    tmp_path: Path,
) -> None:
    resume = f"spiketrain resume {tmp_path.name} --runs {tmp_path.parent}"
    (tmp_path / "cluster.json").write_text(json.dumps({"address": "10.0.0.1:6379"}))
    assert how_to_resume(tmp_path) == f"{resume} --address ADDRESS"
    for suite in (json.dumps({"cluster": {"address": None}}), "{"):
        (tmp_path / "suite.json").write_text(suite)
        assert how_to_resume(tmp_path) == resume
