"""The command line on a recipe file."""

from pathlib import Path

import pytest

from tests.helpers.small import Command, command

RECIPE = """
from tests.helpers.small import small_recipe
from pipeline.recipe.recipe import spec
from pipeline.models.mlp import mlp

def recipe():
    return small_recipe(model=spec(mlp, in_features=64, hidden=(16,)))
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command(monkeypatch, capsys)


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(RECIPE)
    return str(tmp_path / "mine.py")
