"""What infra/setup.sh has pip do, with a pip that writes down what it is told; no package is
fetched or installed.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# But for pip, and for what tries whether all of it imports, the interpreter of this test.
PYTHON = f"""#!/usr/bin/env bash
if [[ $1 == -W ]]; then exit; fi
if [[ $1 != -m ]]; then exec {sys.executable} "$@"; fi
echo "$@" >>told
for word in "$@"; do if [[ $word == /dev/fd/* ]]; then cat "$word" >>piped; fi; done
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What the image copies, beside a .venv that holds what this test's does; every system package
    is there.
    """
    copied = {name: (ROOT / name).read_text() for name in ("pyproject.toml", "requirements.lock")}
    for name, text in {
        **copied,
        "infra/setup.sh": (ROOT / "infra/setup.sh").read_text(),
        ".venv/bin/python": PYTHON,
        ".venv/bin/pip": "",
        "system/dpkg-query": "#!/bin/sh\necho installed",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv" / "lib").mkdir()
    (tmp_path / ".venv" / "lib" / "python3").symlink_to(Path(sysconfig.get_path("purelib")).parent)
    return tmp_path


def set_up(clone: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = {"PATH": f"{clone / 'system'}:{os.environ['PATH']}"}
    return subprocess.run(
        [clone / "infra" / "setup.sh"],
        env={**os.environ, **path, **environment},
        capture_output=True,
        text=True,
    )


def test_the_environment_of_another_clone_is_not_emptied_through_a_link(clone: Path) -> None:
    other = clone / "other"
    (clone / ".venv").rename(other)
    (other / "home").write_text("/home/me/other\n")
    (clone / ".venv").symlink_to(other)
    done = set_up(clone)
    assert done.returncode != 0 and f"setup: .venv is a link to {other}," in done.stderr
    assert (other / "home").read_text() == "/home/me/other\n"


def test_locked_nothing_is_fetched_that_has_no_hash(clone: Path) -> None:
    """Neither a release nor what builds one: pip fetches that anew for each source archive, unless
    it is told not to.
    """
    done = set_up(clone, LOCKED="1")
    assert done.returncode == 0, done.stdout + done.stderr
    builder, releases, package = (clone / "told").read_text().splitlines()
    assert "--require-hashes" in builder and re.fullmatch(
        r"setuptools==\S+( \\\n    --hash=sha256:\w{64})+\n( +#.*\n)+",
        (clone / "piped").read_text(),
    )
    assert {"--require-hashes", "--no-build-isolation", "requirements.lock"} <= set(
        releases.split()
    )
    assert {"--no-deps", "--no-build-isolation", "--editable"} <= set(package.split())


def test_cards_that_torch_cannot_use_are_told_of_and_no_failure(clone: Path) -> None:
    """The sentence is that of the clone's own code."""
    (measure := clone / "pipeline" / "measure").mkdir(parents=True)
    said = "def unusable_gpus():\n    return 'install driver 580 or newer'\n"
    for package in (measure.parent, measure):
        (package / "__init__.py").touch()
    (measure / "memory.py").write_text(said)
    done = set_up(clone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines().count("setup: install driver 580 or newer") == 1


def test_the_image_asks_the_toolkit_for_what_torch_and_nvml_need() -> None:
    """And is not made from an image of CUDA, whose libraries torch's wheels would double."""
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^ARG BASE=ubuntu:", text, re.MULTILINE)
    last = text.rsplit("FROM ${BASE}", 1)[1]
    for variable in ("VISIBLE_DEVICES=all", "DRIVER_CAPABILITIES=compute,utility"):
        assert re.search(rf"\bNVIDIA_{variable}\b", last)
