"""A scheduler's own program, given what was rendered; whatever goes wrong is one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from pipeline.refused import Refused

PATIENCE_S = 120.0


def answer_of(name: str, *words: str, given: str = "") -> str:
    """What the program printed, once it has taken the order: `given` on its standard input, or in its words.

    It is looked for on PATH, and beside this Python, where `ray` is.

    Raises:
        Refused: it is not there, it fails, or it does not answer in time.
    """
    beside = str(Path(sys.executable).parent)
    program = shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", os.defpath), beside)))
    if program is None:
        raise Refused(f"submit: needs {name} on the path; got none")
    try:
        done = subprocess.run([program, *words], input=given, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        raise Refused(f"submit: {name} must answer within {PATIENCE_S:.0f} s; it has not, and may have taken it") from None
    except OSError as error:
        raise Refused(f"submit: {program} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()
        said = " ".join(" ".join(lines if len(lines) < 4 else lines[-1:]).split())  # of a traceback the last alone
        raise Refused(f"submit: {name} failed with exit code {done.returncode} and said: {said}")
    return done.stdout.strip()
