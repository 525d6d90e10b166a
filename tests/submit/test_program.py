"""What a scheduler's program does instead of answering is one line, which says what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.refused import Refused
from pipeline.submit import program
from pipeline.submit.program import answer_of


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in on the path, for its script to be written."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    file = tmp_path / "sbatch"
    file.touch()
    file.chmod(0o755)
    return file


def test_it_is_given_the_order_and_answers(sbatch: Path) -> None:
    sbatch.write_text('#!/bin/sh\necho "$@"; cat\n')
    assert answer_of("sbatch", "--parsable", "a b", given="#!/bin/bash\n") == "--parsable a b\n#!/bin/bash"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('echo "no kind RayJob" >&2; echo "  install the CRDs first" >&2', "no kind RayJob install the CRDs first"),
        ("echo Traceback >&2; echo a >&2; echo b >&2; echo 'RuntimeError: nobody  there' >&2", "RuntimeError: nobody there"),
        ("echo out", "out"),
        ("true", "nothing"),
    ],
)  # fmt: skip
def test_one_that_fails(sbatch: Path, script: str, said: str) -> None:
    sbatch.write_text(f"#!/bin/sh\n{script}\nexit 3\n")
    with pytest.raises(Refused) as refused:
        answer_of("sbatch")
    assert str(refused.value) == f"submit: sbatch failed with exit code 3 and said: {said}"


def test_one_that_does_not_answer(sbatch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch.write_text("#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr(program, "PATIENCE_S", 0.2)
    with pytest.raises(Refused, match=r"^submit: sbatch must answer within 0 s; it has not, and may have taken it$"):
        answer_of("sbatch")


def test_one_that_is_no_program(sbatch: Path) -> None:
    sbatch.write_bytes(b"\x7fELF")
    with pytest.raises(Refused, match=r"^submit: .*sbatch cannot be run: Exec format error$"):
        answer_of("sbatch")


def test_one_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Refused, match=r"^submit: needs sbatch on the path; got none$"):
        answer_of("sbatch")
