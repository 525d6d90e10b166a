"""README.md and the pages of docs/: their Python runs as it stands there, their commands exist, and
README keeps to its size.
"""

import json
import math
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import snntorch
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from typer.core import TyperCommand

import pipeline
from benchmarks.memory_picture import RULES, draw
from benchmarks.pictures import template, write_shapes
from pipeline.data.datasets.tasks import Permuted
from pipeline.data.mixing import Mixing
from pipeline.data.write.images import write_fashion
from pipeline.models.qkformer import qkformer_10
from pipeline.models.teachers.timm import timm_teacher
from pipeline.models.transforms import binarized
from pipeline.recipe.recipe import Phase, read_json, spec
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF
from pipeline.spiking.synapse import Linear
from pipeline.train.distillation import Distillation
from recipes.fashion.base import fashion
from tests.data.conftest import small_fashion
from tests.helpers.small import Command, Done, events, small_recipe, train_inline

__all__ = ["small_fashion"]  # a fixture

ROOT = Path(__file__).parents[1]
# Without the log, whose commands belong to their commits.
PAGES = {
    file.name: file.read_text()
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if file.name != "LOG.md"
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.DOTALL)


NETWORK, LOOP = blocks("README.md", "python")
[PHASES] = blocks("rules.md", "python")
MINE, PARTS, TAUGHT, RESULT = blocks("recipes.md", "python")
FRAME, COMPARE = blocks("comparing.md", "python")
[WRAPPED] = blocks("data.md", "python")
BRIEFLY = ("--inline", "--set", "backend=plain", "--set", "stop_after=2", "--set", "batch_size=8")
# The first command of docs/recipes.md, which writes pictures.
WRITE = blocks("recipes.md", "sh")[0].splitlines()[0].removesuffix(" --workers 2").split()[1:]


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("own_store")
@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        pytest.param("mine", MINE, ["BPTT ", "SLTT "], id="mine"),
        pytest.param(
            "taught", TAUGHT, ["first 0.", "student 0."], marks=pytest.mark.full, id="taught"
        ),
    ],
)
def test_a_recipe_file_of_the_page_trains(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    done: Done,
    name: str,
    text: str,
    said: list[str],
) -> None:
    """On pictures of two classes, written as the page says."""
    assert f"`{name}.py`" in PAGES["recipes.md"]
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 3)):
        for label in ("cat", "dog"):
            (folder := tmp_path / "pictures" / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (80, 70, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    Path(f"{name}.py").write_text(text)
    done(*WRITE)
    done("show", f"{name}.py", "--workers", "2")
    out = done("launch", f"{name}.py", *BRIEFLY)
    assert all(re.search(f"^{beginning}", out, re.MULTILINE) for beginning in said), out


@pytest.mark.usefixtures("own_store")
def test_a_dataset_of_torch_trains(
    tmp_path: Path, small_fashion: Path, monkeypatch: pytest.MonkeyPatch, done: Done
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = "def recipe():\n    return small_recipe(data=data)\n"
    Path("clothes.py").write_text(
        f"from tests.helpers.small import small_recipe\n{WRAPPED}\n\n{recipe}"
    )
    assert "from_dataset" in done("show", "clothes.py")
    shutil.copytree(small_fashion, tmp_path / "data" / "torch" / "FashionMNIST" / "raw")
    done("launch", "clothes.py", *BRIEFLY, "--name", "clothes")
    assert events(Path("runs/clothes"), "finish")


def test_parts_and_phases_of_a_recipe() -> None:
    known = (spec, binarized, qkformer_10, Distillation, timm_teacher, Mixing, Phase, Permuted)
    names = {each.__name__: each for each in known}
    parts, phases = (eval(f"dict({text})", dict(names)) for text in (PARTS, PHASES))
    assert replace(small_recipe(), **parts).teacher is not None
    assert [each.name for each in replace(small_recipe(), **phases).phases] == ["first", "second"]


@pytest.mark.parametrize("rule", [SLTT, partial(SLTT, k=1, rescale=True), OTTT, BPTT])
def test_the_plain_loop_learns(rule: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Any of the rules that it names, also one that returns terms without a gradient.

    Each class has a pixel that is brighter.
    """
    torch.manual_seed(0)
    target_B = torch.arange(32) % 10
    x_BC = torch.rand(32, 784) + F.one_hot(target_B, 784)
    losses, plain = [], F.cross_entropy

    def recorded(logits_BK: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = plain(logits_BK, target)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(F, "cross_entropy", recorded)
    names: dict[str, Any] = {"nn": nn, "torch": torch, "F": F, "partial": partial}
    names |= {"pipeline": pipeline, "snntorch": snntorch, "SLTT": rule}
    names["batches"] = [(x_BC.expand(4, -1, -1), target_B)] * 40
    exec(compile(f"{NETWORK}\n{LOOP}", "README.md", "exec"), names)
    assert fmean(losses[-4:]) < 0.5 * fmean(losses[:4])
    assert len(LOOP.splitlines()) <= 11


def test_rules_are_compared_on_a_network_and_a_batch(capsys: pytest.CaptureFixture[str]) -> None:
    network = nn.Sequential(Linear(16, 8), LIF(0.5), Linear(8, 4))
    batch = {"x_TB": torch.rand(3, 4, 16), "target_B": torch.arange(4)}
    exec(
        compile(COMPARE, "comparing.md", "exec"),
        {"pipeline": pipeline, "network": network, **batch},
    )
    out = capsys.readouterr().out
    assert "Sequential\n" in out and "largest batch" in " ".join(out.split())


def test_the_frame_of_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_inline(tmp_path / "runs" / "small", small_recipe(stop_after=2))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(FRAME, "comparing.md", "exec"), names)
    [mean] = names["means"].to_dict("records")
    assert 0 <= mean["top1"] <= 1 and mean["peak_saved_bytes"] > 0 and mean["wall_s"] > 0


def test_readme_keeps_to_its_size() -> None:
    text = re.sub(r"```.*?```", "", PAGES["README.md"], flags=re.DOTALL)
    paragraphs = [p for p in re.split(r"\n\s*\n", text) if not p.lstrip().startswith(("|", "#"))]
    assert len(PAGES["README.md"].splitlines()) <= 150 and len(text.split()) <= 1300
    assert max(len(each.split()) for each in paragraphs) <= 60


def test_the_picture_is_what_the_command_draws(tmp_path: Path) -> None:
    sweep = json.loads((ROOT / "docs/memory.json").read_text())
    draw(sweep, tmp_path / "memory.svg")
    assert (tmp_path / "memory.svg").read_text() == (ROOT / "docs/memory.svg").read_text()
    assert sweep["commit"] in PAGES["README.md"]
    sweep["points"] = [each for each in sweep["points"] if each["cost"]["rule"] != RULES[-1]]
    with pytest.raises(ValueError, match=f"no {RULES[-1]}"):
        draw(sweep, tmp_path / "memory.svg")


def commands(page: str) -> Iterator[str]:
    """Of `sh` blocks and of code inside of sentences; one with `...` leaves a part out."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", PAGES[page])
    yield from (each for each in lines if each.startswith("spiketrain ") and "..." not in each)


COMMANDS = [(page, each) for page in PAGES for each in commands(page)]
assert len(COMMANDS) > 50


@pytest.mark.parametrize(("page", "typed"), COMMANDS)
def test_a_command_of_a_page_exists_with_its_options(
    page: str, typed: str, monkeypatch: pytest.MonkeyPatch, spiketrain: Command
) -> None:
    monkeypatch.setattr(TyperCommand, "invoke", lambda self, context: None)
    code, _, error = spiketrain(*shlex.split(typed)[1:])
    # A sentence may name a command without its arguments.
    assert code == 0 or error.startswith("Missing "), f"{page}: {error}"


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_template_is_stable_and_rules_are_near_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: Done
) -> None:
    """On 102 pictures, at half their size for speed. benchmarks/pictures.py takes several sets and
    seeds at full size.
    """
    monkeypatch.chdir(tmp_path)
    write_shapes(tmp_path / "pictures", train=34, val=60)
    done(*WRITE)
    (tmp_path / "mine.py").write_text(template(3))
    changes = ("data.size=32", "backend=plain", "evaluation.every=0", "log_every=1")
    set_ = [word for each in changes for word in ("--set", each)]
    done("launch", "mine.py", "--inline", "--device", "cpu", *set_)
    top1 = {}
    for folder in Path("runs").glob("mine-*/"):
        if (folder / "summary.json").exists():
            summary = read_json(folder / "summary.json")
            assert (summary["rollbacks"], summary["skipped_batches"]) == (0, 0)
            top1[summary["rule"]] = summary["top1"]
            losses = [event["metrics"]["loss"] for event in events(folder, "step")]
            # The first is ln 3; at lr=0.2 BPTT's reached 1.44.
            assert len(losses) == 30 and max(losses) < 1.1 * math.log(3)
    assert top1.keys() == {"BPTT", "SLTT"} and min(top1.values()) > 0.5
    assert abs(top1["BPTT"] - top1["SLTT"]) < 0.15


def test_the_result(
    tmp_path: Path,
    small_fashion: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spiketrain: Command,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_fashion(tmp_path / "data" / "fashion", source=small_fashion)
    run = tmp_path / "runs" / "fashion-demo-sltt-20260105-120000"
    train_inline(run, replace(fashion().tiny(), rule=spec(SLTT), backend="plain"))
    capsys.readouterr()
    code = RESULT.replace("fashion-demo-sltt-...", run.name)
    assert code != RESULT
    exec(compile(code, "recipes.md", "exec"), {})
    assert re.fullmatch(r"tensor\([01]\.\d*\)\n", capsys.readouterr().out)
    assert spiketrain("export", run.name)[0] == 0
