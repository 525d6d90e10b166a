"""The command line: quick help everywhere, one line and exit code 2 for what a user can mend, and a run from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.data.write import write_fashion
from tests.small import same_weights

RECIPE = """
from dataclasses import replace
from pipeline.recipe import spec
from pipeline.rules.bptt import BPTT
from tests.small import small_recipe

def recipe():
    base = small_recipe(checkpoint_every=0, epochs=1)
    return [replace(base, name="one-bptt", rule=spec(BPTT)), replace(base, name="one-sltt")]
"""


def spiketrain(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipeline", *words], capture_output=True, text=True, timeout=110, cwd=cwd)


COMMANDS = ["launch", "resume", "evaluate", "compare", "show", "runs", "write fashion", "write folder", "verify", "sync"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_shows_an_example(command: str) -> None:
    done = spiketrain(*command.split(), "--help")
    assert done.returncode == 0
    assert "Example: spiketrain" in done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, pipeline.__main__ as m\n"
        "try:\n    m.app(['launch', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'ray', 'mlflow', 'deepspeed', 'ffcv', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("[]")


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        spiketrain("--help")
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 1.0


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fashion-MNIST with one flipped byte."""
    folder = tmp_path_factory.mktemp("damaged")
    write_fashion(folder)
    file = folder / "train.beton"
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte[0] ^ 1]))
    return folder


def refused(*words: str) -> str:
    done = spiketrain(*words)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("launch nowhere.py", "must be a Python file that defines recipe(); got nowhere.py, which does not exist"),
        ("launch README.md", "must be a Python file"),
        ("launch recipes/fashion/sltt.py --set optimiser.lr=1", "no field 'optimiser'; it has name, model, rule"),
        ("launch recipes/fashion/sltt.py --set rule.kk=1", "SLTT: unexpected keyword 'kk'; it accepts k, chunk, rescale"),
        ("launch recipes/fashion/sltt.py --set epochs=many", "epochs must be int; got 'many'"),
        ("launch recipes/fashion/sltt.py --set epochs", "must look like key=value"),
        ("launch recipes/fashion/sltt.py --workers 3", "batch_size must divide by 3 workers"),
        ("launch recipes/fashion/sltt.py --inline --workers 2", "--inline is one worker"),
        ("launch recipes/fashion/sltt.py --set data.folder=nowhere", "does not exist"),
        ("show recipes/fashion/sltt.py --set rule.k=9", "k must be in 1..T"),
        ("resume none", "none"),
        ("evaluate none", "none"),
        ("compare none", "none"),
        ("sync none", "none"),
        ("verify nowhere", "nowhere"),
        ("write folder --source nowhere --out x", "nowhere"),
    ],
)
def test_a_mistake_ends_in_one_line(words: str, said: str, tmp_path: Path) -> None:
    place = [] if words.split()[0] in ("show", "verify", "write") else ["--runs", str(tmp_path)]
    assert said in refused(*words.split(), *place)


def test_a_flipped_byte_in_the_data_is_refused_by_verify_and_by_launch(damaged: Path, tmp_path: Path) -> None:
    assert "train.beton" in refused("verify", str(damaged))
    said = refused(
        "launch", "recipes/fashion/sltt.py", "--tiny", "--inline", "--set", f"data.folder={damaged}", "--runs", str(tmp_path)
    )
    assert "train.beton" in said
    assert "page" in said


def test_show_needs_no_data_and_prints_what_will_be_used() -> None:
    done = spiketrain("show", "recipes/imagenet/nf_resnet34_sltt.py", "--workers", "8")
    assert done.returncode == 0, done.stderr
    assert "21,797,688" in done.stdout
    assert "256 = 8 workers x 32 samples x 1 accumulated" in done.stdout
    settings = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert settings["train_batch_size"] == 256
    assert settings["managed_gradient_accumulation"] is False


def test_a_comparison_from_launch_to_table(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(RECIPE)
    runs = ["--runs", str(tmp_path / "runs")]
    done = spiketrain("launch", str(tmp_path / "two.py"), "--inline", *runs)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "resume  spiketrain resume one-bptt" in done.stdout
    table = json.loads(spiketrain("compare", "--format", "json", *runs).stdout)
    assert [run["rule"] for run in table["runs"]] == ["BPTT", "SLTT-2"]
    assert table["study"]
    listed = spiketrain("runs", *runs).stdout
    assert listed.count("finished") == 2
    [sltt] = (tmp_path / "runs").glob("one-sltt*")
    evaluated = spiketrain("evaluate", sltt.name, *runs)
    assert "on 20 samples" in evaluated.stdout, evaluated.stderr
    again = spiketrain("resume", sltt.name, *runs)
    assert "has finished" in again.stdout
    synced = spiketrain("sync", sltt.name, *runs)
    assert " 0 points delivered" in synced.stdout, synced.stderr
    second = spiketrain("launch", str(tmp_path / "two.py"), "--inline", "--runs", str(tmp_path / "other"))
    assert second.returncode == 0
    [other] = (tmp_path / "other").glob("one-sltt*")
    assert same_weights(sltt, other)
