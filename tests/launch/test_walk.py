"""From `spiketrain launch` to the first forward of the network under Ray, a recipe passes the files
that CONTRIBUTING.md lists, and at most ten.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST = 10

RECIPE = """
import traceback
from pathlib import Path

import torch
from torch import nn

from pipeline.recipe.recipe import spec
from pipeline.spiking.neuron import LIF
from pipeline.spiking.synapse import Linear
from tests.helpers.small import small_recipe


class Traced(nn.Module):
    def __init__(self, file):
        super().__init__()
        self.file, self.hidden, self.neuron = Path(file), Linear(64, 4), LIF(0.5)
        self.classifier = Linear(4, 10)

    def forward(self, x_TBCHW):
        is_training = torch.distributed.is_initialized() and torch.is_grad_enabled()
        if is_training and not self.file.exists():
            files = [frame.filename for frame in traceback.extract_stack()]
            self.file.write_text("\\n".join(files[:-1]))
        return self.classifier(self.neuron(self.hidden(x_TBCHW.flatten(2))))


def recipe():
    return small_recipe(model=spec(Traced, file="{file}"), epochs=1)
"""

DRIVER = """
import sys, threading, traceback
from pathlib import Path

from pipeline.__main__ import main
from pipeline.launch.ray import Ray

run, file, main_thread = Ray.run, Path(sys.argv.pop()), threading.main_thread().ident


def traced(self, job, attempt):
    # The driver runs the launcher in a thread of its own.
    frames = [*traceback.extract_stack(sys._current_frames()[main_thread])]
    frames += traceback.extract_stack()
    file.write_text("\\n".join(frame.filename for frame in frames))
    return run(self, job, attempt)


Ray.run = traced
main()
"""


def files_of(stack: Path) -> list[str]:
    paths = [Path(line) for line in stack.read_text().splitlines()]
    return [str(path.relative_to(ROOT)) for path in paths if path.is_relative_to(ROOT / "pipeline")]


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_recipe_passes_the_files_of_the_walk_and_no_other(tmp_path: Path) -> None:
    recipe, driver, worker = (tmp_path / name for name in ("traced.py", "driver", "worker"))
    recipe.write_text(RECIPE.replace("{file}", str(worker)))
    words = ["launch", str(recipe), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *words, str(driver)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    passed = list(dict.fromkeys([*files_of(driver), *files_of(worker)]))
    listed = re.findall(
        r"^\d+\. `(pipeline/[\w/]+\.py)`",
        (ROOT / "CONTRIBUTING.md")
        .read_text()
        .partition("## The walk of a recipe\n")[2]
        .partition("\n## ")[0],
        flags=re.MULTILINE,
    )
    assert passed == listed and len(listed) <= MOST
