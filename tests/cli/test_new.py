import re
from pathlib import Path

import pytest

from pipeline.data.datasets.synthetic import Synthetic
from pipeline.recipe.recipe import Recipe, spec
from pipeline.recipe.recipe_files import load_recipe
from tests.helpers.small import Done, Refused, finished


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_recipe_trains_as_it_stands_and_each_of_its_choices_has_a_comment(
    done: Done, tmp_path: Path
) -> None:
    said = done("new", "mine")
    assert re.findall("spiketrain .*", said) == [
        "spiketrain write fashion --out data/fashion",
        "spiketrain launch mine.py --workers 2",
    ]
    lines = Path("mine.py").read_text().splitlines()
    choices = [index for index, line in enumerate(lines) if re.match(r" {8}\w+=", line)]
    assert len(choices) == 11
    assert all(lines[index - 1].startswith("        # ") for index in choices)
    recipe = load_recipe(tmp_path / "mine.py")
    assert isinstance(recipe, Recipe) and recipe.name == "mine"
    data = spec(Synthetic, samples=64, val_samples=20, shape=(1, 28, 28))
    assert finished(tmp_path / "run", recipe.override({"backend": "plain"}).tiny(data=data))["top1"]
    Path("data/fashion").mkdir(parents=True)
    assert "write fashion" not in done("new", "other")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mine", "new: mine.py must not exist yet; it does: choose another name"),
        ("my-own", "new: NAME must have only letters, digits and _, no digit first; got my-own"),
    ],
)
def test_nothing_is_overwritten(name: str, said: str, refused: Refused) -> None:
    Path("mine.py").write_text("x = 1\n")
    assert refused("new", name) == said
    assert [path.read_text() for path in Path().iterdir()] == ["x = 1\n"]
