"""A command announces each slow stage before it begins."""

import subprocess
import sys

import pytest

from pipeline.__main__ import main
from pipeline.core.stages import say_stage

FIRST = """
import sys
from pipeline.core import stages as waiting

SLOW = ("torch", "ray", "mlflow", "deepspeed", "ffcv", "numpy")

def say_stage(stage):
    print(stage, [name for name in SLOW if name in sys.modules])

waiting.say_stage = say_stage
sys.argv = ["spiketrain", *sys.argv[1:]]
from pipeline.__main__ import main
from pipeline.core.stages import say_stage
main()
"""


@pytest.mark.parametrize(
    "words",
    [
        "launch recipes/fashion/sltt.py --set optimiser.lr=1",
        pytest.param("evaluate nowhere", marks=pytest.mark.full),
    ],
)
def test_the_first_line_comes_before_any_import_that_takes_seconds(words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FIRST, *words.split()], capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == "importing torch and other packages that this command needs []\n"


@pytest.mark.parametrize(
    ("words", "stage"),
    [
        ("launch recipes/fashion/sltt.py --inline", "checking the recipe and its data"),
        (
            "probe recipes/fashion/sltt.py",
            "reading a batch; a machine's first start compiles the data loader",
        ),
        (
            "sweep recipes/fashion/sltt.py",
            "reading a batch; a machine's first start compiles the data loader",
        ),
        ("verify nowhere", "reading every byte of nowhere"),
    ],
)
def test_a_stage_is_a_line_on_stderr_alone(
    words: str, stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["--set", "data.folder=nowhere"] if "recipes" in words else []
    monkeypatch.setattr("sys.argv", ["spiketrain", *words.split(), *changes])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (2, "")
    stages, (error,) = said.err.splitlines()[:-1], said.err.splitlines()[-1:]
    assert stages == [f"spiketrain: {stage} ..."] and "nowhere" in error


def test_a_terminal_breaks_a_stage_between_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    say_stage("measuring BPTT, BPTT-recompute and SLTT-1")
    assert capsys.readouterr().err == (
        "spiketrain: measuring BPTT,\n  BPTT-recompute and SLTT-1 ...\n"
    )
