"""`spiketrain carryover`: one table, the same figures as JSON beside the summary, and one line for what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.data.base import DataError
from pipeline.data.synthetic import Synthetic
from pipeline.launch.prepare import write_job
from pipeline.recipe import write_json
from tests.small import make_run, small_recipe, train_inline

SPIKETRAIN = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that finished."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    recipe = small_recipe(stop_after=4)
    write_job(make_run(folder, recipe))
    assert train_inline(folder, recipe) is not None
    return folder


@pytest.fixture
def spiketrain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> SPIKETRAIN:
    """The command line in this process: exit code, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setattr("sys.argv", ["spiketrain", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return run


def test_one_table_and_a_file(spiketrain: SPIKETRAIN, folder: Path) -> None:
    code, said, _ = spiketrain("carryover", folder, "--steps", "1,3", "--batch", "8")
    assert code == 0
    rows = [line.split() for line in said.splitlines()[2:10]]
    kinds = ["real", "zero", "shuffled", "gaussian"]
    assert [row[:2] for row in rows] == [[T, kind] for T in "13" for kind in kinds]
    assert "20 samples, ± one standard error as if each were drawn by itself; gaussian: their moments; shuffled: " in said
    assert "MB" in said
    written = json.loads((folder / "carryover.json").read_text())
    assert (written["run"], written["which"], written["trained_steps"], written["by"]) == ("run", "last", 3, None)
    assert [(each["steps"], each["carry_over"]) for each in written["ensembles"]] == [(T, kind) for T in (1, 3) for kind in kinds]
    for row, each in zip(rows, written["ensembles"], strict=True):
        assert row[2] == f"{each['single']['value']:.2%}" and row[3] == f"{each['ensemble']['value']:.2%}"
    summary = json.loads((folder / "summary.json").read_text())
    assert written["ensembles"][4]["ensemble"]["value"] == pytest.approx(summary["top1"], abs=1e-12)


class Scenes(Synthetic):
    """Five scenes of each object."""

    def groups(self, use: str, *, by: str) -> list[str]:
        if by != "object":
            raise DataError(f"Scenes: must group its samples by {by!r}; it groups them by object")
        return [f"{use}-{place // 5}" for place in range(self.val_samples)]


@pytest.fixture(scope="module")
def grouped(folder: Path) -> Path:
    """The run, of data that groups its samples."""
    grouped = folder.parent / "grouped"
    shutil.copytree(folder, grouped)
    recipe = small_recipe(stop_after=4)
    data = replace(recipe.data, target=Scenes)
    write_json(grouped / "recipe.json", replace(recipe, data=data).to_json())
    return grouped


def test_errors_over_groups(spiketrain: SPIKETRAIN, folder: Path, grouped: Path) -> None:
    code, said, _ = spiketrain("carryover", grouped, "--steps", "3", "--by", "object", "--trust", "tests")
    assert code == 0 and "20 samples, ± one standard error over their 4 groups by object; gaussian" in said
    assert spiketrain("carryover", folder, "--steps", "3")[0] == 0
    by_object, alone = (json.loads((each / "carryover.json").read_text()) for each in (grouped, folder))
    assert (by_object["by"], by_object["groups"], alone["groups"]) == ("object", 4, 20)
    for one, other in zip(by_object["ensembles"], alone["ensembles"], strict=True):
        assert one["single"]["value"] == other["single"]["value"] and one["single"]["error"] != other["single"]["error"]
    code, _, line = spiketrain("carryover", grouped, "--by", "author", "--trust", "tests")
    assert code == 2 and "must group its samples by 'author'; it groups them by object" in line and len(line.splitlines()) == 1


def test_still_images_are_asked_at_1_2_4_8(spiketrain: SPIKETRAIN, folder: Path) -> None:
    assert spiketrain("carryover", folder)[0] == 0
    written = json.loads((folder / "carryover.json").read_text())
    assert [each["steps"] for each in written["ensembles"][::4]] == [1, 2, 4, 8]


def test_mistakes_end_in_one_line(spiketrain: SPIKETRAIN, folder: Path) -> None:
    for words, said in (
        (("--steps", "1,two"), "--steps must be numbers of time steps, such as 1,2,4,8; got '1,two'"),
        (("--steps", "0"), "--steps must be numbers of time steps, such as 1,2,4,8; got '0'"),
        (("--by", "object"), "carryover: --by needs data that groups its samples; got --by object, and Synthetic has no groups"),
        (("--batch", "1"), "--help"),
    ):
        code, _, line = spiketrain("carryover", folder, *words)
        assert code == 2 and said in line and len(line.splitlines()) == 1, line


def test_a_run_of_several_tasks_is_refused(spiketrain: SPIKETRAIN, folder: Path, tmp_path: Path) -> None:
    from recipes.continual.permuted_fashion_hlop_sltt import recipe as continual

    other = tmp_path / "other"
    other.mkdir()
    made = continual()
    write_json(other / "recipe.json", replace(made, name="other").to_json())
    code, _, line = spiketrain("carryover", other)
    assert code == 2 and f"must be of one task; got {len(made.phases)} phases in other" in line
