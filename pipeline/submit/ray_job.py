"""An order as a job of a Ray cluster that is up already: `ray job submit`, to the cluster's dashboard."""

from __future__ import annotations

import re
import shlex
from uuid import uuid4

from pipeline.door import offer_token
from pipeline.submit.order import Order
from pipeline.submit.program import answer_of

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
    launch += ["--workers", order.asked, "--or-resume"]
    # A job's name is used up with its end, unlike a run's: the same order again goes on with the run in a new job.
    job = f"{order.name}-{uuid4().hex[:8]}"
    http = "http://" + address.removeprefix(SCHEME)
    return shlex.join(["ray", "job", "submit", "--address", http, "--submission-id", job, "--no-wait", "--", *launch])


def submit(rendered: str) -> str:
    """The job's name, once Ray has taken it.

    Raises:
        Refused: it was not taken: nobody is there, or asks for a token that RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH does not tell.
    """
    ray, *words = shlex.split(rendered)
    offer_token()
    answer_of(ray, *words)
    return words[words.index("--submission-id") + 1]
