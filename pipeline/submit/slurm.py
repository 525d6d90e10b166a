"""A launch as a job of Slurm: `infra/slurm/train.sbatch` with an order's values, handed to sbatch."""

from __future__ import annotations

import re
import shlex

from pipeline.submit.order import Order
from pipeline.submit.program import answer_of
from pipeline.units import counted

_FILLED_IN = ("job-name",)
"""directives of the script that an order replaces"""


def render(order: Order, *, nodes: int, gpus_per_node: int, time: str, partition: str | None = None) -> str:
    """The script to submit. `time` is Slurm's: minutes, hours:minutes:seconds, or days-hours.

    Raises:
        ValueError: a value that Slurm would not take, or that could become another command; no template in the order's folder.
    """
    _refuse_unless_it_fits(order, nodes=nodes, gpus_per_node=gpus_per_node)
    # sbatch reads a directive by rules of its own, where quotes are no fence: only plain values go into one.
    directives = {
        "job-name": _plain("name", order.name, r"[A-Za-z0-9][\w.-]{0,127}"),
        "nodes": str(nodes),
        "time": _plain("time", time, r"(\d{1,4}-)?\d{1,6}(:\d{1,2}){0,2}"),
        **({"gpus-per-node": str(gpus_per_node)} if gpus_per_node else {}),
        **({"partition": _plain("partition", partition, r"[\w.-]+(,[\w.-]+)*")} if partition is not None else {}),
    }
    variables = {
        "words": f"({shlex.join(order.words)})",
        "runs": shlex.quote(order.runs),
        "workers": "" if order.workers is None else order.asked,  # without any the script takes one for each GPU, or node
        "image": shlex.quote(order.image),
    }
    script = _script(order)
    for name in _FILLED_IN:
        script = _one_line(script, rf"#SBATCH --{name}=.*\n", "")
    for name, value in variables.items():
        script = _one_line(script, rf"{name}=.*\n", f"{name}={value}\n")
    shebang, rest = script.split("\n", 1)
    return "\n".join([shebang, *(f"#SBATCH --{name}={value}" for name, value in directives.items()), rest])


def submit(rendered: str) -> str:
    """The number of the job, once Slurm has taken it.

    Raises:
        Refused: sbatch did not take the script; it is where one can log in to a cluster.
    """
    return answer_of("sbatch", "--parsable", given=rendered).split(";")[0]


def _refuse_unless_it_fits(order: Order, *, nodes: int, gpus_per_node: int) -> None:
    if nodes < 1 or gpus_per_node < 0:
        raise ValueError(f"slurm: nodes must be 1 or more, gpus_per_node 0 or more; got {nodes} and {gpus_per_node}")
    if len(order.sizes) > 1:
        raise ValueError(f"slurm: the nodes of a job stay as many as they are, so workers must be one number; got {order.asked}")
    there = nodes * gpus_per_node
    workers = order.sizes[0] if order.sizes else there  # as the script counts them
    if there and order.option("--device") != "cpu" and order.side_by_side * workers > there:
        room = f"{counted(nodes, 'node')} x {counted(gpus_per_node, 'GPU')}"
        raise ValueError(f"slurm: each worker takes a GPU; got {order.wanted(workers)} on {room}")


def _script(order: Order) -> str:
    file = order.infra / "train.sbatch"
    try:
        return file.read_text()
    except OSError as error:
        raise ValueError(f"slurm: the template of the job cannot be read: {file}: {error.strerror}") from error


def _plain(name: str, value: str, pattern: str) -> str:
    if not re.fullmatch(pattern, value, re.ASCII):
        raise ValueError(f"slurm: {name} must match {pattern}; got {value!r}")
    return value


def _one_line(script: str, pattern: str, line: str) -> str:
    text, found = re.subn(rf"^{pattern}", lambda _: line, script, flags=re.MULTILINE)
    if found != 1:
        raise ValueError(f"slurm: the template of the job must have one line {pattern!r}; it has {found}")
    return text
