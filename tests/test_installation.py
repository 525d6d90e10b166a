"""What works without the extras, and what the command line says when an extra is missing."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import pipeline
from pipeline.train.export import export_run
from tests.helpers.rule_networks import outputs
from tests.helpers.small import small_recipe, train_inline, without_stages

# Hides the modules in HIDDEN from the imports of a process.
HIDE = """
import sys
from importlib.machinery import PathFinder


class AsIfNotInstalled(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            return None
        return super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = AsIfNotInstalled
"""

# Trains by two rules in a plain loop, then opens saved networks.
PLAIN = """
import json
import sys

import torch
from torch import nn

from torch.nn.functional import cross_entropy

import pipeline
import spiketrain
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.encode import repeat
from pipeline.spiking.neuron import LIF
from pipeline.spiking.state import fresh_state
from pipeline.spiking.synapse import Linear

losses = {}
for name, rule in {"SLTT": SLTT(), "OTTT": OTTT()}.items():
    torch.manual_seed(0)
    network = nn.Sequential(Linear(16, 32), LIF(0.5), Linear(32, 4))
    rule.attach(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9)
    x_BD, target_B = torch.randn(64, 16), torch.arange(64) % 4
    losses[name] = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = 0.0
        for term in rule.loss_terms(
            network, repeat(x_BD, 4), lambda logits_BK: cross_entropy(logits_BK, target_B)
        ):
            term.backward.backward()
            loss += term.loss.item()
        optimizer.step()
        losses[name].append(loss)
    rule.release()

logits = []
for saved in sys.argv[1:]:
    network = pipeline.load(saved)
    with torch.no_grad(), fresh_state(network):
        logits.append(network(torch.ones(3, 2, 1, 8, 8)).mean(0).tolist())
print(json.dumps({"losses": losses, "logits": logits}))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    run = tmp_path_factory.mktemp("saved") / "run"
    train_inline(run, small_recipe(epochs=1))
    return run, export_run(run).file


def check(done: subprocess.CompletedProcess[str], saved: tuple[Path, Path]) -> None:
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["losses"]) == {"SLTT", "OTTT"}
    assert all(losses[-1] < losses[0] / 2 for losses in found["losses"].values())
    network = pipeline.load(saved[0])
    expected = outputs(network, torch.ones(3, 2, 1, 8, 8)).mean(0)
    logits = torch.tensor(found["logits"])
    assert torch.allclose(logits, torch.stack([expected] * 2), rtol=0, atol=1e-5)


def python(code: str, *words: object, hidden: set[str]) -> subprocess.CompletedProcess[str]:
    code = f"HIDDEN = {hidden!r}\n{HIDE}\n{code}"
    words_ = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(words_, capture_output=True, text=True, timeout=110)


def test_a_plain_loop_and_load_need_no_extra(saved: tuple[Path, Path]) -> None:
    hidden = modules_of("train", "ffcv", "report")
    assert {"ray", "deepspeed", "ffcv", "mlflow", "typer", "rich", "plotly"} <= hidden
    check(python(PLAIN, *saved, hidden=hidden), saved)


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_an_installation_without_extras_trains_and_loads(
    saved: tuple[Path, Path], tmp_path: Path
) -> None:
    """A wheel, made of the sdist, in an empty environment; then with the extra for training."""
    source, bin_, built = (tmp_path / name for name in ("source", "venv/bin", "built"))
    source.mkdir()
    for name in ("pyproject.toml", "LICENSE", "spiketrain.py"):
        shutil.copy(name, source)
    for name in ("pipeline", "recipes"):
        shutil.copytree(name, source / name)
    subprocess.run([sys.executable, "-m", "venv", bin_.parent], check=True)

    def done(*words: object, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            list(map(str, words)), cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )

    def pip(*words: object) -> None:
        ran = done(bin_ / "pip", "--quiet", "--disable-pip-version-check", *words)
        assert ran.returncode == 0, ran.stderr

    sdist = f"from setuptools.build_meta import build_sdist\nbuild_sdist({str(built)!r})"
    assert done(sys.executable, "-c", sdist, cwd=source).returncode == 0
    pip("wheel", "--no-deps", "--wheel-dir", built, *built.glob("*.tar.gz"))
    [wheel] = built.glob("*.whl")
    pip("install", wheel)
    check(
        done(bin_ / "python", "-c", PLAIN.replace("pipeline.load", "spiketrain.load"), *saved),
        saved,
    )
    helped = done(bin_ / "spiketrain", "--help")
    assert (helped.returncode, helped.stdout) == (2, "")
    assert re.fullmatch(ONE_LINE.format(module="typer", extras="train.*report"), helped.stderr)
    pip("install", f"{wheel}[train]")
    counts = ("--samples", "64", "--val-samples", "16", "--slices", "10")
    for words in (
        ("write", "events", "moving", "--out", "data/moving", *counts),
        ("launch", "events/moving_sltt", "--tiny", "--inline"),
    ):
        ran = done(bin_ / "spiketrain", *words)
        assert ran.returncode == 0, ran.stderr


ONE_LINE = (
    r"spiketrain: this command needs {module}, which is not installed:"
    r" pip install 'spiketrain\[{extras}\]'\n"
)
MAIN = "from pipeline.__main__ import main\nmain()"


@pytest.mark.parametrize(
    ("words", "hidden", "module", "extras"),
    [
        ("--help", ("train", "report"), "typer", r"train\]' or pip install 'spiketrain\[report"),
        ("compare", ("train", "report"), "typer", r"train\]' or pip install 'spiketrain\[report"),
        ("dashboard --runs RUNS", ("report",), "flask", "report"),
        pytest.param(
            "launch RECIPE", ("train",), "prometheus_client", "train", marks=pytest.mark.full
        ),
    ],
)
def test_a_command_names_the_extra_that_is_missing(
    words: str, hidden: tuple[str, ...], module: str, extras: str, tmp_path: Path
) -> None:
    """`hidden`: the extras that are not installed, but for what the other one brings too."""
    (recipe := tmp_path / "one.py").write_text(
        "from tests.helpers.small import small_recipe as recipe"
    )
    given = words.replace("RUNS", str(tmp_path)).replace("RECIPE", str(recipe)).split()
    kept = modules_of(*({"train", "report"} - set(hidden)))
    done = python(MAIN, *given, hidden=modules_of(*hidden) - kept)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert re.fullmatch(ONE_LINE.format(module=module, extras=extras), without_stages(done.stderr))


def test_reports_need_their_extra_alone(saved: tuple[Path, Path]) -> None:
    both = "import sys\nfrom pipeline.cli.app import app\nruns = ['--runs', sys.argv[1]]\n"
    both += (
        "for words in (['compare'], ['report', 'run']): app([*words, *runs], standalone_mode=False)"
    )
    hidden = modules_of("train") - modules_of("report")
    done = python(both, saved[0].parent, hidden=hidden)
    assert done.returncode == 0, done.stderr
    *table, page = done.stdout.strip().splitlines()
    assert "SLTT-2" in "".join(table)
    assert Path(page).stat().st_size > 1_000_000  # plotly.js is in the page


def test_import_pipeline_is_light_and_names_are_imported_on_use() -> None:
    code = (
        "import sys, pipeline, spiketrain\n"
        "light = 'torch' not in sys.modules and 'pipeline.recipe' not in sys.modules\n"
        "made = [getattr(spiketrain, name).__name__ for name in spiketrain.__all__]\n"
        "print(light, made == pipeline.__all__, spiketrain.wrap is pipeline.wrap)"
    )
    assert python(code, hidden=modules_of("train", "report")).stdout == "True True True\n"
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'Recipes'"):
        _ = getattr(pipeline, "Recipe" + "s")


def test_a_module_of_no_extra_is_no_message_for_the_user() -> None:
    done = python(MAIN, "--help", hidden={"difflib"})
    assert done.returncode == 1 and "No module named 'difflib'" in done.stderr


def modules_of(*extras: str) -> set[str]:
    """The top-level modules of the packages that these extras list."""
    listed = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    needed = [each for extra in extras for each in listed[extra]]
    names = {re.split(r"[^\w-]", each)[0] for each in needed}
    modules = {"pyyaml": "yaml", "pillow": "PIL", "opencv-python": "cv2"}
    # timm imports these three itself.
    needed_without = {"pyyaml", "pillow", "fsspec"}
    return {modules.get(name, name.replace("-", "_")) for name in names - needed_without}
