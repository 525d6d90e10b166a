"""The command line: quick help everywhere, one line and exit code 2 for what a user can mend, and a
run from end to end.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from pipeline.cli.app import app
from pipeline.data.write.images import write_fashion
from tests.helpers.small import command, same_weights, without_stages

RECIPE = """
from dataclasses import replace
from pipeline.recipe.recipe import spec
from pipeline.rules.bptt import BPTT
from tests.helpers.small import small_recipe

def recipe():
    base = small_recipe(epochs=1).override({"checkpoints.every": 0})
    return [replace(base, name="one-bptt", rule=spec(BPTT)), replace(base, name="one-sltt")]
"""


def spiketrain(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *words],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=cwd,
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, pipeline.cli.app as m\ntry:\n    m.app(['launch', '--help'])\nexcept"
        " SystemExit:\n    pass\nprint([name for name in ('torch', 'ray', 'mlflow', 'deepspeed',"
        " 'ffcv', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("[]")


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
    words = [sys.executable, "-c", ENDS.replace("{how}", how)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (
        code,
        "the last line\nregistered for the end\n",
    ), done.stderr
    assert ("ZeroDivisionError" in done.stderr) == (code == 1)


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


UserError = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> UserError:
    """The one line that a command is refused with; in this process, which has imported
    everything.
    """
    run = command(monkeypatch, capsys)

    def said(*words: str) -> str:
        capsys.readouterr()
        code, _, error = run(*words)
        return _one_line(code, error)

    return said


def _one_line(code: int, error: str) -> str:
    assert code == 2, error
    assert "Traceback" not in error
    error = without_stages(error)
    assert len(error.strip().splitlines()) == 1, error
    return error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "launch nowhere.py",
            "must be a Python file that defines recipe(); got nowhere.py, which does not exist",
        ),
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
        ("launch", "Missing argument 'RECIPE...'"),
        ("lunch", "No such command 'lunch'"),
        ("show recipes/fashion/sltt.py --workers 3", "batch_size must divide by 3 workers"),
        ("compare --format xml", "'xml' is not one of 'table', 'json', 'csv'"),
        (
            "launch recipes/fashion/sltt.py --inline --max-restarts 1",
            "without Ray; got --max-restarts 1",
        ),
        ("launch recipes/fashion/sltt.py --workers 3", "batch_size must divide by 3 workers"),
        ("launch recipes/fashion/sltt.py --inline --workers 2", "--inline is one worker"),
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
            "launch recipes/compare/sei_stamps.py --seeds 2",
            "launch: --seeds makes a comparison of recipes; got a suite that is one",
        ),
        (
            "launch recipes/fashion/sltt.py recipes/fashion/sltt.py",
            "recipes must have names of their own; got two of 'fashion-sltt'",
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
        ("resume none --runs RUNS", "no run or suite 'none' in RUNS, which has no runs"),
        ("evaluate none --runs RUNS", "no run 'none' in RUNS, which has no runs"),
        ("export none --runs RUNS", "no run 'none' in RUNS, which has no runs"),
        ("evaluate recipes/fashion/sltt.py", "needs --weights FILE; got no --weights"),
        (
            "evaluate recipes/fashion/sltt.py --weights nowhere.pt",
            "nowhere.pt must be a file of weights; it does not exist",
        ),
        ("compare none --runs RUNS", "no run 'none' in RUNS, which has no runs"),
        ("sync none --runs RUNS", "no run or suite 'none' in RUNS, which has no runs"),
        ("register none --as x --runs RUNS", "no run 'none' in RUNS, which has no runs"),
        ("register none", "Missing option '--as'. (see spiketrain register --help)"),
        ("verify nowhere", "data: HERE/nowhere does not exist; write it first"),
        (
            "write folder --source nowhere --out RUNS",
            "write_folder: HERE/nowhere/train must be a folder of class folders; it does not exist",
        ),
    ],
)
def test_a_mistake_ends_in_one_line(
    words: str, said: str, tmp_path: Path, refused: UserError
) -> None:
    runs = tmp_path / "runs"
    told = said.replace("RUNS", str(runs)).replace("HERE", str(Path.cwd()))
    given = f"{words} --runs RUNS" if words.startswith("launch ") else words
    assert told in refused(*given.replace("RUNS", str(runs)).split())
    assert list(tmp_path.iterdir()) == []


def _commands(within: Any, *words: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, each in within.commands.items():
        yield from (
            _commands(each, *words, name) if hasattr(each, "commands") else [((*words, name), each)]
        )


def test_a_number_that_is_none_or_without_end_is_refused_whatever_the_option(
    refused: UserError,
) -> None:
    tried = 0
    for words, each in _commands(typer.main.get_command(app)):
        for option in (
            option for option in each.params if option.type_descriptor.annotation is float
        ):
            for value in ("nan", "inf", "-inf"):
                said = refused(
                    *words,
                    option.opts[-1],
                    value,
                    *(["x"] if words[0] not in ("compare", "report") else []),
                )
                assert said.startswith(
                    (
                        f"Invalid value for '{option.opts[-1]}': ",
                        f"{words[-1]}: {option.opts[-1]} is",
                    )
                )
                tried += 1
    assert tried == 3 * 9


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "launch recipes/fashion/sltt.py --inline --node-loss patient",
            "without Ray; got --node-loss patient",
        ),
        (
            "evaluate recipes/fashion/sltt.py --weights x.pt",
            "--runs is where a run is found, and a recipe is a file; got",
        ),
        (
            "plan recipes/fashion/sltt.py",
            "plan: --runs is where the run of --against is found; got --runs",
        ),
        (
            "dashboard --store sqlite:///x.db",
            "dashboard: --store names the store, so --runs has no effect; got --runs",
        ),
    ],
)
def test_an_option_without_effect_is_refused(
    words: str, said: str, tmp_path: Path, refused: UserError
) -> None:
    assert said in refused(*words.split(), "--runs", str(tmp_path / "runs"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("lunch", "No such command 'lunch'"),
        (
            "launch recipes/fashion/sltt.py --inline --set data.folder=nowhere --runs",
            "does not exist",
        ),
        ("evaluate none --runs", "none"),
    ],
)
def test_nothing_that_is_imported_adds_a_line_to_it(words: str, said: str, tmp_path: Path) -> None:
    done = spiketrain(*words.split(), *([str(tmp_path)] if words.endswith("--runs") else []))
    assert said in _one_line(done.returncode, done.stderr)


def test_a_flipped_byte_in_the_data_is_refused_by_verify_and_by_launch(
    damaged: Path, tmp_path: Path, refused: UserError
) -> None:
    assert "train.beton" in refused("verify", str(damaged))
    said = refused(
        "launch",
        "recipes/fashion/sltt.py",
        "--tiny",
        "--inline",
        "--set",
        f"data.folder={damaged}",
        "--runs",
        str(tmp_path),
    )
    assert "train.beton" in said
    assert "page" in said


OWN = """
from dataclasses import replace
from torch import nn
from pipeline.recipe.recipe import spec
from pipeline.spiking.neuron import LIF
from pipeline.spiking.synapse import Linear
from pipeline.rules.bptt import BPTT
from tests.helpers.small import small_recipe

class Flat(nn.Module):
    def forward(self, x_TBCHW):
        return x_TBCHW.flatten(2)

def my_network(classes):
    return nn.Sequential(Flat(), Linear(64, 8), LIF(), Linear(8, classes))

def recipe():
    base = small_recipe(epochs=1, backend="deepspeed", model=spec(my_network, classes=10))
    base = base.override({"checkpoints.every": 0})
    return [replace(base, name="own-bptt", rule=spec(BPTT)), replace(base, name="own-sltt")]
"""


def test_a_network_of_the_recipe_files_own_trains_by_two_rules_with_deepspeed_inline(
    tmp_path: Path,
) -> None:
    """In processes of its own: that the file's folder is not on the path is the point."""
    (tmp_path / "own_lab.py").write_text(OWN)
    runs = ["--runs", str(tmp_path / "runs")]
    done = spiketrain("launch", str(tmp_path / "own_lab.py"), "--inline", *runs)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "SLTT-2 is SLTT(k=2, rescale=True)" in done.stdout
    assert "--trust own_lab" in done.stdout
    [run] = (tmp_path / "runs").glob("own-sltt*")
    untrusted = spiketrain("evaluate", run.name, *runs)
    assert "name its package with --trust" in _one_line(untrusted.returncode, untrusted.stderr)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model.classes=3", "must have the same classes; got 3 and 10"),
        ("batch_size=1000", "batch_size must be at most the 64"),
        ("optimizer.lrr=1", "lrr"),
        ("optimizer.opt=sgdd", "sgdd"),
        ("init=README.md", "init: "),
        ("rule.k=9", "k must be in 1..T; got k=9, T=3"),
    ],
)
def test_what_does_not_fit_leaves_no_run_behind(
    tmp_path: Path, change: str, said: str, refused: UserError
) -> None:
    (tmp_path / "one.py").write_text("from tests.helpers.small import small_recipe as recipe\n")
    runs = tmp_path / "runs"
    assert said in refused(
        "launch", str(tmp_path / "one.py"), "--inline", "--runs", str(runs), "--set", change
    )
    assert not runs.exists()


def test_a_cluster_that_is_not_there_is_refused_within_seconds(
    tmp_path: Path, refused: UserError
) -> None:
    (tmp_path / "one.py").write_text("from tests.helpers.small import small_recipe as recipe\n")
    begun = time.monotonic()
    said = refused(
        "launch",
        str(tmp_path / "one.py"),
        "--address",
        "127.0.0.1:1",
        "--runs",
        str(tmp_path / "runs"),
    )
    assert "no cluster let us in at '127.0.0.1:1'" in said
    assert time.monotonic() - begun < 60
    assert not (tmp_path / "runs").exists()


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
    tmp_path: Path, body: str, said: str, refused: UserError
) -> None:
    (tmp_path / "mine.py").write_text(f"def recipe():\n    {body}\n")
    assert said in refused("show", str(tmp_path / "mine.py"))


def test_a_run_that_was_moved_or_damaged(tmp_path: Path, refused: UserError) -> None:
    from pipeline.launch.prepare import write_job
    from tests.helpers.interruptions import Killed, die_at
    from tests.helpers.small import make_run, small_recipe, train_inline

    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, 9)
        with pytest.raises(Killed):
            train_inline(tmp_path / "first" / "run", small_recipe())
    run = tmp_path / "second" / "moved"
    run.parent.mkdir()
    (tmp_path / "first" / "run").rename(run)
    job = make_run(tmp_path / "first" / "run", small_recipe())
    write_job(job)
    (tmp_path / "first" / "run" / "job.json").rename(run / "job.json")
    (run / "cluster.json").write_text('{"inline": true}')
    before = sorted((tmp_path / "first" / "run").iterdir())
    done = spiketrain("resume", str(run))  # as a user would, from another process
    assert done.returncode == 0, done.stderr + done.stdout
    assert json.loads((run / "summary.json").read_text())["steps"] == 16
    assert sorted((tmp_path / "first" / "run").iterdir()) == before
    for damage in ("{", "[]", '{"version": 1}', '{"version": 1, "recipe": {"name": "x"}}'):
        (run / "recipe.json").write_text(damage)
        assert "recipe.json" in refused("evaluate", str(run))


def test_show_needs_no_data_and_prints_what_will_be_used() -> None:
    done = spiketrain("show", "recipes/imagenet/nf_resnet34_sltt.py", "--workers", "8")
    assert done.returncode == 0, done.stderr
    assert "21,797,688" in done.stdout
    assert "256 = 8 workers x 32 samples x 1 accumulated" in done.stdout
    assert "779.202 MB saved for backward" in done.stdout and "4,099.81 GFLOP" in done.stdout
    settings = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert settings["train_batch_size"] == 256
    assert settings["managed_gradient_accumulation"] is False


def test_a_comparison_from_launch_to_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = command(monkeypatch, capsys)
    (tmp_path / "two.py").write_text(RECIPE)
    runs = ["--runs", str(tmp_path / "runs")]
    done = spiketrain("launch", str(tmp_path / "two.py"), "--inline", *runs)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "resume  spiketrain resume one-bptt" in done.stdout
    [table] = json.loads(run("compare", "--format", "json", *runs)[1])
    assert [each["rule"] for each in table["runs"]] == ["BPTT", "SLTT-2"]
    assert table["study"]
    [suite] = (tmp_path / "runs").glob("two-*/suite.json")
    assert json.loads(run("compare", suite.parent.name, "--format", "json", *runs)[1]) == [table]
    listed = run("runs", *runs)[1]
    assert "2 of 2 finished" in listed and listed.count("finished") == 3  # the suite, and its runs
    [sltt] = (tmp_path / "runs").glob("one-sltt*")
    assert "on 20 samples" in run("evaluate", sltt.name, *runs)[1]
    assert "has finished" in run("resume", sltt.name, *runs)[1]
    assert " 0 points delivered" in run("sync", sltt.name, *runs)[1]
    assert (
        run("launch", str(tmp_path / "two.py"), "--inline", "--runs", str(tmp_path / "other"))[0]
        == 0
    )
    [other] = (tmp_path / "other").glob("one-sltt*")
    assert same_weights(sltt, other)


def test_events_are_written_verified_and_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = command(monkeypatch, capsys)

    folder, sizes = (
        str(tmp_path / "moving"),
        ("--samples", "20", "--val-samples", "10", "--slices", "4", "--size", "16"),
    )
    code, out, _ = run("write", "events", "moving", "--out", folder, *sizes)
    assert code == 0
    assert out.splitlines() == [
        f"{name}.beton: {n} samples, 16 classes, 0 skipped"
        for name, n in (("train", 20), ("val", 10))
    ]
    assert run("verify", folder)[0] == 0
    with (tmp_path / "moving" / "val.beton").open("r+b") as file:
        file.truncate(1000)
    code, _, said = run("verify", folder)
    assert code == 2 and "truncated, or another file" in said and said.count("\n") == 1
    code, _, said = run(
        "write", "events", "moving", "--out", str(tmp_path / "other"), "--resize", "sum"
    )
    assert code == 2 and "resize has no effect" in said and said.count("\n") == 1


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
"""the command line on a machine where DeepSpeed prints warnings when it is imported"""


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("words", ["plan RECIPE", "probe RECIPE", "sweep RECIPE --steps 2"])
def test_json_is_all_that_is_on_stdout(words: str, tmp_path: Path) -> None:
    file = tmp_path / "one.py"
    file.write_text(
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
    assert ("[WARNING] no nvcc" in done.stderr) == words.startswith("plan"), (
        "only plan asks the recipe's own backend"
    )
