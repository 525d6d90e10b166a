"""An order as a job of a Ray cluster that is up already: `ray job submit`, to the cluster's dashboard."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

from pipeline.refused import Refused
from pipeline.submit.order import Order

PATIENCE_S = 120.0
SCHEME = "ray://"


def render(order: Order, *, address: str) -> str:
    """The command line that hands the order to `address`, ray://HOST:PORT with the port of the dashboard (8265).

    The driver runs on the head, in the folder that Ray was started in there: `runs` and recipes are paths of that machine.

    Raises:
        ValueError: another address, a name that is none for a run, or an image, which a cluster that is up has its own of.
    """
    if not re.fullmatch(r"ray://[A-Za-z0-9.-]+:\d{1,5}", address, re.ASCII):
        raise ValueError(f"ray: a cluster must be ray://HOST:PORT, with the port of its dashboard; got {address!r}")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,127}", order.name, re.ASCII):
        raise ValueError(f"ray: name must be letters, digits and inner . _ -; got {order.name!r}")
    if order.image:
        raise ValueError(f"ray: a cluster that is up trains with what is installed there; got --image {order.image}")
    launch = ["spiketrain", "launch", *order.words, "--name", order.name, "--runs", order.runs, "--address", "auto"]
    launch += ["--workers", str(order.workers), "--or-resume"]
    # A job's name is used up with its end, unlike a run's: the same order again goes on with the run in a new job.
    job = f"{order.name}-{uuid4().hex[:8]}"
    http = "http://" + address.removeprefix(SCHEME)
    return shlex.join(["ray", "job", "submit", "--address", http, "--submission-id", job, "--no-wait", "--", *launch])


def submit(rendered: str) -> str:
    """The job's name, once Ray has taken it.

    Raises:
        Refused: it was not taken: nobody is there, or asks for a token that RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH does not tell.
    """
    words = shlex.split(rendered)
    ray = shutil.which("ray") or str(Path(sys.executable).with_name("ray"))
    try:
        done = subprocess.run([ray, *words[1:]], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        raise Refused(f"submit: ray job submit must answer within {PATIENCE_S:.0f} s; it has not") from None
    except OSError as error:
        raise Refused(f"submit: {ray} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()] or ["nothing"]
        raise Refused(f"submit: ray job submit failed with exit code {done.returncode} and said: {' '.join(lines[-1].split())}")
    return words[words.index("--submission-id") + 1]
