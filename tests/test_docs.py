"""The pages of docs/ and README.md: each block of code runs as it stands there or says why not,
each command exists with its options, and the site opens from its folder without a network.
"""

import inspect
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from pkgutil import resolve_name
from statistics import fmean
from typing import Any, NamedTuple

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
from pipeline.data.write.images import write_fashion
from pipeline.recipe.recipe import read_json, spec
from pipeline.rules.base import Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF
from pipeline.spiking.synapse import Linear
from recipes.fashion.base import fashion
from tests.data.conftest import small_fashion
from tests.helpers.browser import Watch, chromium
from tests.helpers.small import Command, Done, events, train_inline

__all__ = ["small_fashion"]  # a fixture

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Without the log, whose commands belong to their commits, and what is built.
FILES = [
    file
    for file in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
    if file.name not in ("LOG.md", "questions.md") and "_build" not in file.parts
]
PAGES = {str(file.relative_to(DOCS if file.parent != ROOT else ROOT)): file for file in FILES}


class Block(NamedTuple):
    above: str  # the line above it
    language: str
    text: str

    @property
    def saved_as(self) -> str:
        found = re.search(r"Save this as `([\w.]+)`", self.above)
        return found[1] if found else ""

    @property
    def is_run(self) -> bool:
        return re.match(r"<!-- norun: .+ -->$", self.above) is None


@cache
def blocks(page: str) -> list[Block]:
    """The blocks of code. The output of a command and a part of the site are none."""
    found = re.findall(r"([^\n]*)\n(?:\n)?```(\S+)\n(.*?)```", PAGES[page].read_text(), re.DOTALL)
    known = ("text", "bibtex", "{toctree}", "{api}", "{commands}", "{code-cell}")
    assert {language for _, language, _ in found} <= {"python", "sh", *known}, page
    return [Block(*each) for each in found if each[1] in ("python", "sh")]


RUN_IN = [page for page in PAGES if any(block.is_run for block in blocks(page))]
QUICK = ("index.md", "models.md")


def test_of_seven_blocks_six_run() -> None:
    """Cells of notebooks run where the site is built, the blocks of CONTRIBUTING.md elsewhere."""
    are_run = [block.is_run for page in PAGES for block in blocks(page)]
    are_run += [True] * sum(file.read_text().count("```{code-cell}") for file in FILES)
    assert len(are_run) > 50 and are_run.count(False) <= 0.15 * len(are_run)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("own_store")
@pytest.mark.parametrize(
    "page",
    [each if each in QUICK else pytest.param(each, marks=pytest.mark.full) for each in RUN_IN],
)
def test_the_blocks_of_a_page_run_one_after_another(
    page: str, tmp_path: Path, small_fashion: Path, monkeypatch: pytest.MonkeyPatch, done: Done
) -> None:
    """In a folder with the pictures, the run and the exports that it speaks of, few of each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = _given(page, tmp_path, small_fashion, done)
    for block in blocks(page):
        text = re.sub(r"\bRUN\b|[a-z-]+-20260105-120000", _newest_run, block.text)
        text = text.replace("fashion-demo-sltt-...", "demo")
        if block.saved_as:
            Path(block.saved_as).write_text(text)
        elif block.language == "python" and block.is_run:
            exec(compile(text, page, "exec"), names)
        elif block.is_run:
            for line in text.splitlines():
                done(*_briefly(shlex.split(line)[1:], small_fashion))
    for each in ("mysnn", "mine"):
        sys.modules.pop(each, None)


def _newest_run(_: re.Match[str]) -> str:
    return max(Path("runs").glob("*/recipe.json"), key=lambda f: f.stat().st_mtime).parent.name


# What a command gets besides, so that it takes seconds, and which options it is typed without.
LAUNCH = ("--inline", "--set", "backend=plain", "--set", "stop_after=2", "--set", "batch_size=8")
FEWER = {
    ("write", "fashion"): lambda fashion: ("--source", str(fashion)),
    ("write", "events"): lambda _: ("--samples", "32", "--val-samples", "32"),
    ("launch",): lambda _: LAUNCH,
    ("finetune",): lambda _: ("--inline", "--set", "backend=plain"),
    ("sweep",): lambda _: ("--tiny",),
    ("probe",): lambda _: ("--tiny",),
    ("plan",): lambda _: ("--tiny",),
}


def _briefly(words: list[str], fashion: Path) -> list[str]:
    if "--dry-run" in words:
        return _in_tree(words)
    more = next(
        (more for begin, more in FEWER.items() if tuple(words[: len(begin)]) == begin), None
    )
    left_out = {"launch": "workers|device", "finetune": "workers", "plan": "workers"}.get(words[0])
    if left_out is not None:
        words = shlex.split(re.sub(rf" --({left_out}) \S+", "", shlex.join(words)))
    return [*_in_tree(words), *(more(fashion) if more else ())]


def _in_tree(words: list[str]) -> list[str]:
    return [str(ROOT / word) if word.startswith("recipes/") else word for word in words]


def _given(page: str, folder: Path, small_fashion: Path, done: Done) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    for part, count in (("pictures/train", 12), ("pictures/val", 3), ("birds", 10), ("photos", 10)):
        for label in ("cat", "dog"):
            (into := folder / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (80, 70, 3), np.uint8)
                Image.fromarray(pixels).save(into / f"{number}.jpg")
    shutil.copy(folder / "birds/cat/0.jpg", "robin.jpg")
    Image.open("robin.jpg").save("wren.png")
    shutil.copytree(folder / "birds", "holiday")
    [mine] = (each.text for each in blocks("tutorials/own_pictures.md") if each.saved_as)
    Path("mine.py").write_text(mine)
    text = PAGES[page].read_text()
    if re.search(r"data/fashion|recipes[./]fashion", text) and "write fashion" not in text:
        write_fashion(folder / "data/fashion", source=small_fashion)
    if "demo-sltt-..." in text:
        few = replace(fashion(), rule=spec(SLTT), backend="plain", stop_after=2, batch_size=8)
        train_inline(folder / "runs/demo", few)
    if re.search(r"-20260105-|\bRUN\b", text):
        done("write", "folder", "--source", "pictures", "--out", "data/given")
        Path("given.py").write_text("from mine import recipe as both\nrecipe = lambda: both()[1]")
        done("launch", "given.py", "--name", "given", "--set", "data.folder=data/given", *LAUNCH)
        for name in ("fashion", "birds"):
            done("export", "given", "--out", f"{name}.safetensors")
    if "launch mine.py" in text and "--out data/pictures" not in text:
        done("write", "folder", "--source", "pictures", "--out", "data/pictures")
    if "torch_dataset" in text:
        shutil.copytree(small_fashion, folder / "data/torch/FashionMNIST/raw")
    network = nn.Sequential(Linear(16, 8), LIF(0.5), Linear(8, 4))
    names: dict[str, Any] = {"pipeline": pipeline, "x_TB": torch.rand(3, 4, 16)}
    names |= {"network": network, "target_B": torch.arange(4)}
    if page == "index.md":
        lif = partial(snntorch.Leaky, beta=0.5, init_hidden=True)
        names["network"] = nn.Sequential(nn.Linear(16, 8), lif(), nn.Linear(8, 4), lif(output=True))
    return names | PLAIN_LOOP


PLAIN_LOOP: dict[str, Any] = {"nn": nn, "torch": torch, "F": F, "partial": partial, "SLTT": SLTT}
PLAIN_LOOP |= {"snntorch": snntorch, "batches": [(torch.rand(4, 2, 784), torch.arange(2))] * 2}


@pytest.mark.parametrize("rule", [SLTT, partial(SLTT, k=1, rescale=True), OTTT, BPTT])
def test_the_plain_loop_learns(rule: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Any of the rules that it names, also one that returns terms without a gradient.

    Each class has a pixel that is brighter.
    """
    network, loop = (block.text for block in blocks("README.md") if block.language == "python")
    torch.manual_seed(0)
    target_B = torch.arange(32) % 10
    x_BC = torch.rand(32, 784) + F.one_hot(target_B, 784)
    losses, plain = [], F.cross_entropy

    def recorded(logits_BK: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = plain(logits_BK, target)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(F, "cross_entropy", recorded)
    batches = [(x_BC.expand(4, -1, -1), target_B)] * 40
    names = {**PLAIN_LOOP, "pipeline": pipeline, "SLTT": rule, "batches": batches}
    exec(compile(f"{network}\n{loop}", "README.md", "exec"), names)
    assert fmean(losses[-4:]) < 0.5 * fmean(losses[:4])
    assert len(loop.splitlines()) <= 11


def test_readme_keeps_to_its_size() -> None:
    whole = PAGES["README.md"].read_text()
    text = re.sub(r"```.*?```", "", whole, flags=re.DOTALL)
    paragraphs = [p for p in re.split(r"\n\s*\n", text) if not p.lstrip().startswith(("|", "#"))]
    assert len(whole.splitlines()) <= 150 and len(text.split()) <= 1300
    assert max(len(each.split()) for each in paragraphs) <= 60


def test_the_picture_is_what_the_command_draws(tmp_path: Path) -> None:
    sweep = json.loads((DOCS / "memory.json").read_text())
    draw(sweep, tmp_path / "memory.svg")
    assert (tmp_path / "memory.svg").read_text() == (DOCS / "memory.svg").read_text()
    assert sweep["commit"] in PAGES["README.md"].read_text()
    sweep["points"] = [each for each in sweep["points"] if each["cost"]["rule"] != RULES[-1]]
    with pytest.raises(ValueError, match=f"no {RULES[-1]}"):
        draw(sweep, tmp_path / "memory.svg")


def commands(page: str) -> Iterator[str]:
    """Of `sh` blocks, also those that are not run, and of code inside of sentences; one with `...`
    leaves a part out.
    """
    lines = [
        line for each in blocks(page) if each.language == "sh" for line in each.text.splitlines()
    ]
    lines += re.findall(r"`([^`\n]+)`", PAGES[page].read_text())
    for each in lines:
        # typer's own options for completion would change the shell of whoever tests.
        if each.startswith("spiketrain ") and "..." not in each and "-completion" not in each:
            yield each


COMMANDS = [(page, each) for page in PAGES for each in commands(page)]


@pytest.mark.parametrize(("page", "typed"), COMMANDS)
def test_a_command_of_a_page_exists_with_its_options(
    page: str, typed: str, monkeypatch: pytest.MonkeyPatch, spiketrain: Command
) -> None:
    assert len(COMMANDS) > 60
    monkeypatch.setattr(TyperCommand, "invoke", lambda self, context: None)
    code, _, error = spiketrain(*shlex.split(typed)[1:])
    # A sentence may name a command without its arguments.
    assert code == 0 or error.startswith("Missing "), f"{page}: {error}"


API = (DOCS / "api.md").read_text()
SHARED = set(re.findall(r"`(\w+)`", API.partition("\n## ")[0]))


# The modules of what has a paper; the others say how the pipeline itself works.
PUBLISHED = re.compile(
    r"pipeline\.(rules\.(?!base)|spiking\.(neuron|integer|rate|surrogate|norm|dropout|equilibrium)$"
    r"|models\.(?!mlp|transforms|program|published|nir|teachers|foreign)\w+$)"
)
UNITS = {  # the arguments with a unit, and the words of which one stands near them
    "memory": "bytes",
    "limit_gb": "10.9 bytes",
    "minutes": "minutes",
    "warmup": "share",
    "decay_every": "share",
    "threshold": "units? of|of the current",
    "tau": "time constant",
    "dt": "time step",
    "size": "pixels|rank",
    "reach": "pixels",
    "cutout": "pixels",
    "share": "probability|fraction|share of",
    "dropout": "probability|share of",
    "probability": "probability",
    "held_out": "share|fraction",
}


@pytest.mark.parametrize("name", re.findall(r"^pipeline\.[\w.]+$", API, flags=re.MULTILINE))
def test_a_public_name_says_its_arguments_shapes_errors_and_source(name: str) -> None:
    part = resolve_name(name)
    module = sys.modules[part.__module__].__doc__ or ""
    text = f"{part.__doc__ or ''}\n{module}"
    arguments = inspect.signature(part).parameters.values()
    named = SHARED | {"self", "args", "kwargs"} | set(re.findall(r"\w+", text))
    assert part.__doc__ and [each.name for each in arguments if each.name not in named] == []
    if any(each.annotation in (torch.Tensor, "Tensor") for each in arguments):
        assert "[" in text, "the shape of a tensor"
    code = inspect.getsource(part)
    if isinstance(part, type):
        code = "".join(
            re.findall(r"    def __(?:post_)?init__.*?(?=\n    def |\Z)", code, re.DOTALL)
        )
    if re.search(r"\brequire\(|raise ValueError|\brefuse", code):
        assert "Raises:" in part.__doc__
    is_rule = isinstance(part, type) and issubclass(part, Rule) and part is not Rule
    if PUBLISHED.match(part.__module__):
        assert re.search(r"Source: .*(arXiv|doi)", part.__doc__ if is_rule else text, re.DOTALL)
    if isinstance(part, type) and issubclass(part, LIF):  # PLIF: "All else is as in LIF."
        text += LIF.__doc__ or ""
    for argument in UNITS.keys() & {each.name for each in arguments} - SHARED:
        near = [text[each.start() :][:300] for each in re.finditer(rf"\b{argument}\b", text)]
        assert any(re.search(UNITS[argument], each) for each in near), f"the unit of {argument}"


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_site_works_from_its_folder_without_a_network(tmp_path: Path) -> None:
    """Built as by `make docs`, which runs the notebooks: no warning, and no page asks a host."""
    site = tmp_path / "html"
    words = ("-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-d", tmp_path / "trees", DOCS, site)
    done = subprocess.run((sys.executable, *words), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = [file for file in sorted(site.rglob("*.html")) if "_static" not in file.parts]
    assert len(pages) > 40
    with chromium() as browser:
        page = browser.new_context(offline=True).new_page()
        (watch := Watch()).over(page)
        for file in pages:
            page.goto(file.as_uri(), wait_until="load")
            assert page.locator("h1").first.is_visible()
        page.goto((site / "rules/sltt.html").as_uri())
        page.locator("mjx-container svg").first.wait_for()
        page.goto((site / "notebooks/own_network.html").as_uri())
        figure = page.locator(".cell_output img").first
        assert figure.is_visible() and figure.evaluate("each => each.naturalWidth") > 300
        page.goto((site / "search.html").as_uri() + "?q=equilibrium")
        page.get_by_role("link", name="IDE", exact=True).first.wait_for()
        assert [asked for asked in watch.asked if not asked.startswith("file:")] == []


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
    done(*shlex.split(blocks("tutorials/own_pictures.md")[0].text.splitlines()[0])[1:])
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
