"""The Python of README.md, as it stands there: recipes, saved under the names that it gives them,
train for a few batches.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.pictures import template, write_shapes
from pipeline.data.mixing import Mixing
from pipeline.data.write.images import write_fashion
from pipeline.models.binarized import binarized
from pipeline.models.qkformer import qkformer_10
from pipeline.models.teachers.timm import timm_teacher
from pipeline.recipe.recipe import read_json, spec
from pipeline.rules.sltt import SLTT
from pipeline.track.journal import read
from pipeline.train.distillation import Distillation
from recipes.fashion.base import fashion
from tests.data.conftest import small_fashion
from tests.small import command, small_recipe, train_inline

__all__ = ["small_fashion"]  # a fixture

README = Path(__file__).parents[1] / "README.md"
PARTS, MINE, TAUGHT, RESULT = re.findall(
    r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL
)
BRIEFLY = ("--inline", "--set", "backend=plain", "--set", "stop_after=2", "--set", "batch_size=8")


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Path:
    """A folder to work in, with pictures of two classes written as README says."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 3)):
        for label in ("cat", "dog"):
            (folder := tmp_path / "pictures" / part / label).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(draw.integers(0, 256, (80, 70, 3), np.uint8)).save(
                    folder / f"{number}.jpg"
                )
    told = re.search(r"spiketrain (write folder .*) --workers 2\n", README.read_text())
    assert told is not None
    assert command(monkeypatch, capsys)(*told[1].split())[0] == 0
    return tmp_path


def test_parts_of_a_recipe() -> None:
    names = {
        each.__name__: each
        for each in (spec, binarized, qkformer_10, Distillation, timm_teacher, Mixing)
    }
    parts = eval(f"dict({PARTS})", dict(names))
    assert replace(small_recipe(), **parts).teacher is not None


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [("mine", MINE, ["BPTT ", "SLTT "]), ("taught", TAUGHT, ["first 0.", "student 0."])],
    ids=["mine", "taught"],
)
def test_a_recipe_file(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
    said: list[str],
) -> None:
    run = command(monkeypatch, capsys)
    assert f"`{name}.py`" in README.read_text()
    (place / f"{name}.py").write_text(text)
    assert run("show", f"{name}.py", "--workers", "2")[0] == 0
    code, out, error = run("launch", f"{name}.py", *BRIEFLY)
    assert code == 0, error
    lines = out.splitlines()
    assert all(any(line.startswith(beginning) for line in lines) for beginning in said), out


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_template_is_stable_and_rules_are_near_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On 102 pictures, at half their size for speed; benchmarks/pictures.py takes several sets and
    seeds as README has them.
    """
    monkeypatch.chdir(tmp_path)
    write_shapes(tmp_path / "pictures", train=34, val=60)
    run = command(monkeypatch, capsys)
    told = re.search(r"spiketrain (write folder .*) --workers 2\n", README.read_text())
    assert told is not None and run(*told[1].split())[0] == 0
    (tmp_path / "mine.py").write_text(template(3))
    changes = ("data.size=32", "backend=plain", "evaluation.every=0", "log_every=1")
    code, _, error = run(
        "launch",
        "mine.py",
        "--inline",
        "--device",
        "cpu",
        *(word for each in changes for word in ("--set", each)),
    )
    assert code == 0, error
    top1 = {}
    for folder in Path("runs").glob("mine-*/"):
        if (folder / "summary.json").exists():
            summary = read_json(folder / "summary.json")
            assert (summary["rollbacks"], summary["skipped_batches"]) == (0, 0)
            top1[summary["rule"]] = summary["top1"]
            losses = [
                event["metrics"]["loss"]
                for event in read(folder / "journal.jsonl")
                if event["event"] == "step"
            ]
            assert len(losses) == 30 and max(losses) < 1.1 * math.log(
                3
            )  # the first is ln 3; at lr=0.2 BPTT's reached 1.44
    assert top1.keys() == {"BPTT", "SLTT"} and min(top1.values()) > 0.5
    assert abs(top1["BPTT"] - top1["SLTT"]) < 0.15


def test_the_result(
    tmp_path: Path,
    small_fashion: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_fashion(tmp_path / "data" / "fashion", source=small_fashion)
    run = tmp_path / "runs" / "fashion-demo-sltt-20260105-120000"
    train_inline(run, replace(fashion().tiny(), rule=spec(SLTT), backend="plain"))
    capsys.readouterr()
    code = RESULT.replace("fashion-demo-sltt-...", run.name)
    assert code != RESULT
    exec(compile(code, README.name, "exec"), {})
    assert re.fullmatch(r"tensor\([01]\.\d*\)\n", capsys.readouterr().out)
    listed = re.search(r"spiketrain (export RUN.*?)  ", README.read_text())
    assert listed is not None
    assert command(monkeypatch, capsys)(*listed[1].replace("RUN", run.name).split())[0] == 0
