"""In a terminal of 80 columns no command breaks or cuts a word, and no line is wider.

Each command runs in a terminal and in a pipe, which has no width: a word that only the terminal
shows is a part of one.
"""

import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from waitress.server import BaseWSGIServer

from pipeline.data.datasets.synthetic import Synthetic
from pipeline.launch.prepare import write_job
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.recipe.recipe import spec
from pipeline.rules.bptt import BPTT
from tests.data.conftest import small_fashion
from tests.helpers.made_pictures import make as make_pictures
from tests.helpers.small import Command, make_run, small_recipe, train_inline
from tests.test_cli import commands

__all__ = ["small_fashion"]  # a fixture

FILE = """
from dataclasses import replace
from pipeline.launch.prepare import write_job
from pipeline.recipe.recipe import spec
from pipeline.rules.bptt import BPTT
from tests.helpers.small import small_recipe

def recipe():
    sltt = small_recipe(name="a-network-with-a-long-name-sltt", stop_after=4)
    return SEVERAL
"""
SEVERAL = "[replace(sltt, name='a-network-with-a-long-name-bptt', rule=spec(BPTT)), sltt]"
NAME = "a-network-with-a-long-name-{}-20261201-024219-d3b3"
SLOW = pytest.mark.full
COPIED = r"\s*(\S+|(\w+ +)?`?spiketrain .+)"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A folder with three runs, an MLflow store, two recipe files and pictures."""
    lab = tmp_path_factory.mktemp("lab")
    shared = small_recipe(name="sltt", stop_after=4)
    colour = small_recipe(
        name="colour",
        model=spec(nf_resnet18_small, classes=10, width=4, blocks=(1, 1)),
        data=spec(Synthetic, samples=16, val_samples=4, shape=(3, 16, 16)),
        stop_after=2,
    )
    for recipe in (replace(shared, name="bptt", rule=spec(BPTT)), shared, colour):
        run = lab / "runs" / NAME.format(recipe.name)
        write_job(make_run(run, recipe))
        train_inline(run, recipe)
    shutil.copy(empty_store, lab / "runs")
    (lab / "one.py").write_text(FILE.replace("SEVERAL", "sltt"))
    (lab / "several.py").write_text(FILE.replace("SEVERAL", SEVERAL))
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 16), dtype=np.uint8)
    for index, image_HW in enumerate(pixels):
        folder = lab / "pictures" / f"class-{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image_HW).save(folder / f"picture-{index}.png")
    make_pictures(lab / "share")
    return lab


def words_of(text: str) -> set[str]:
    """The words. What differs from run to run is masked: numbers and ends of names."""
    masked = re.sub(r"\d{8}-\d{6}(-[0-9a-f]{4})?|\d[\d.,:]*", "0", text)
    lines = [line for line in masked.splitlines() if "━" not in line]  # only terminals have bars
    return set(re.sub("[│─╭╮╰╯]", " ", " ".join(lines)).split())


def refuse_broken(narrow: str, wide: str) -> None:
    assert "…" not in narrow
    assert words_of(narrow) - words_of(wide) == set()
    wider = [line for line in narrow.splitlines() if len(line) > 80]
    # A command, a path or a name that is to be copied is not broken, and has a line of its own.
    assert [line for line in wider if not re.fullmatch(COPIED, line)] == []


@pytest.mark.parametrize("words", [(), ("write",), *(words for words, _ in commands())])
def test_no_word_of_the_help_is_broken(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, spiketrain: Command
) -> None:
    shown = []
    for width in ("80", "300"):
        monkeypatch.setenv("COLUMNS", width)
        shown.append(spiketrain(*words, "--help")[1])
    refuse_broken(*shown)


@pytest.mark.parametrize(
    "typed",
    [
        "new mine{n}",
        "launch several.py --inline --name suite{n}",
        "runs",
        "compare",
        "models",
        "show one.py",
        "export {run} --out export{n}.safetensors",
        "sync {run}",
        "register {run} --as model",
        "evaluate {run}",
        "write folder --source pictures --out data{n} --val 0.2 --mode raw",
        "write fashion --source {fashion} --out fashion{n}",
        "write events moving --samples 16 --val-samples 16 --out moving{n}",
        "write stamps --source share --samples 52 --val-samples 13 --size 32 --out stamps{n}",
        "dashboard --port 0",
        pytest.param("launch one.py --inline --name run{n}", marks=SLOW),
        pytest.param("report && resume {run}", marks=SLOW),
        pytest.param(
            "finetune {colour} pictures --size 16 --inline --epochs 1 --batch-size 4 --name"
            " tuned{n} --data ffcv{n} && predict tuned{n} pictures && verify ffcv{n}",
            marks=SLOW,
        ),
        pytest.param("check one.py", marks=SLOW),
        pytest.param("doctor", marks=SLOW),
        pytest.param("probe one.py", marks=SLOW),
        pytest.param("sweep one.py --steps 1,2 --batch auto --memory 1", marks=SLOW),
        pytest.param("plan several.py --device h100 --price 3", marks=SLOW),
    ],
)
def test_no_word_of_a_command_is_broken(
    typed: str,
    lab: Path,
    small_fashion: Path,
    monkeypatch: pytest.MonkeyPatch,
    spiketrain: Command,
) -> None:
    monkeypatch.chdir(lab)
    # A dumb terminal has no bold text, and its bar is printed once.
    for name, value in {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(BaseWSGIServer, "run", lambda self: self.close())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    run, colour = NAME.format("sltt"), NAME.format("colour")
    shown = []
    for number, is_terminal in enumerate((True, False)):
        for stream in (sys.stdout, sys.stderr):
            monkeypatch.setattr(stream, "isatty", lambda here=is_terminal: here)
        text = ""
        for command in typed.format(run=run, colour=colour, n=number, fashion=small_fashion).split(
            " && "
        ):
            code, out, error = spiketrain(*command.split())
            assert code == 0, error
            text += out + error
        shown.append(text)
    for each, handler in handlers.items():
        signal.signal(each, handler)
    refuse_broken(*shown)
