"""`spiketrain launch --cluster`: hand a launch to a scheduler, with the options that were typed.

This machine does not need the data.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.options import is_typed
from pipeline.core.checks import require
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.suite import Suite, refuse_references, refuse_untrusted

_PANEL = "Launch on a cluster"


def _option(*words: str, **settings: Any) -> Any:
    return typer.Option(*words, rich_help_panel=_PANEL, **settings)


Where = Annotated[
    str | None,
    _option(
        "--cluster",
        metavar="k8s|slurm|ray://HOST:PORT",
        help=(
            "hand the launch to Kubernetes, Slurm, or the Ray with this dashboard; its --name is"
            " also the job's"
        ),
    ),
]
DryRun = Annotated[bool, _option("--dry-run", help="print what would be submitted")]
Image = Annotated[
    str, _option("--image", help="k8s, required; slurm: of the container that trains")
]
Infra = Annotated[
    Path | None,
    _option(
        "--infra",
        metavar="DIR",
        help=(
            "k8s, required: a folder for kustomize, such as infra/k8s/overlays/SIZE/job; slurm: a "
            "folder with a train.sbatch, infra/slurm unless said"
        ),
    ),
]
Nodes = Annotated[int | None, _option("--nodes", min=1, help="slurm, required: of the job")]
Gpus = Annotated[int | None, _option("--gpus-per-node", min=0, help="slurm")]
Time = Annotated[
    str | None,
    _option("--time", help="slurm, required: such as 12:00:00, after which the job is resumed"),
]
Partition = Annotated[str | None, _option("--partition", help="slurm")]

_OF_SLURM = ("nodes", "gpus_per_node", "time", "partition")
_OPTIONS = ("cluster", "dry_run", "image", "infra", *_OF_SLURM)
_REQUIRED = {"k8s": ("image", "infra"), "slurm": ("nodes", "time")}
# The request sets these options of the launch.
_IN_THE_REQUEST = ("name", "runs", "workers")
# These follow from the job: workers of a Ray cluster train, and a job of the same name resumes.
_OF_THE_JOB = ("inline", "address", "or_resume")


def hand_over(
    context: typer.Context, made: Recipe | Suite, *, sizes: tuple[int, ...], trust: tuple[str, ...]
) -> bool:
    """Submit a launch to a cluster, or print what would be submitted.

    Args:
        sizes: the numbers of workers of the launch.

    Returns: False if the launch is not for a cluster.

    Raises:
        ValueError: options do not fit together, the scheduler would refuse a value, or the launch
            would refuse the recipe, as far as this is known without data.
        UserError: the scheduler did not take the job.
    """
    given = {name: value for name, value in context.params.items() if is_typed(context, name)}
    where = given.get("cluster")
    if where is None:
        _refuse("without --cluster there is nothing that takes", _OPTIONS, given)
        return False
    require(
        where in ("k8s", "slurm") or where.startswith("ray://"),
        f"launch: --cluster must be k8s, slurm or ray://HOST:PORT; got {where}",
    )
    # infra/ sets the node loss of its clusters.
    foreign = {"k8s": (*_OF_SLURM, "node_loss"), "slurm": ("node_loss",)}
    _refuse(
        f"--cluster {where} does not take",
        (*_OF_THE_JOB, *foreign.get(where, (*_OF_SLURM, "infra"))),
        given,
    )
    require(
        "name" in given,
        "launch: --cluster needs a --name, by which the job continues; got none",
    )
    required = _REQUIRED.get(where, ())
    missing = ", ".join(_dashed(name) for name in required if name not in given)
    needs = " and ".join(map(_dashed, required))
    require(not missing, f"launch: --cluster {where} needs {needs}; got no {missing}")
    from pipeline.launch import schedulers

    request = schedulers.LaunchRequest(
        words=tuple(_words(context)),
        name=given["name"],
        # Slurm's script counts the workers if none were asked for.
        sizes=() if where == "slurm" and "workers" not in given else sizes,
        runs=str(given.get("runs", "/shared/runs" if where == "k8s" else "runs")),
        options=given,
    )
    render, submit = {
        "k8s": (schedulers.render_rayjob, schedulers.submit_rayjob),
        "slurm": (schedulers.render_sbatch, schedulers.submit_sbatch),
    }.get(where, (schedulers.render_ray_job, schedulers.submit_ray_job))
    rendered = render(request)
    _check(made, request.sizes or (given["nodes"] * max(given.get("gpus_per_node", 0), 1),), trust)
    typer.echo(rendered if given.get("dry_run") else submit(rendered))
    return True


def _check(made: Recipe | Suite, sizes: tuple[int, ...], trust: tuple[str, ...]) -> None:
    """Refuse now a recipe that would be refused after hours in a queue.

    A file of initial weights may exist on the cluster only.
    """
    from pipeline.train.build import check_recipe, with_placeholder_weights

    if not isinstance(made, Suite):
        refuse_references(made)
    suite = made if isinstance(made, Suite) else Suite((made,))
    refuse_untrusted(suite, trust)
    with with_placeholder_weights(suite) as recipes:
        for recipe in recipes:
            is_there = recipe.init is not None and Path(recipe.init).exists()
            ready = recipe if is_there else replace(recipe, init=None)
            check_recipe(ready.with_untrained_teacher(), *sizes)


def _words(context: typer.Context) -> Iterator[str]:
    """The typed words, recipes first, without those that become fields of the request."""
    for parameter in sorted(
        context.command.params, key=lambda each: each.param_type_name == "option"
    ):
        name = parameter.name or ""
        if name in (*_OPTIONS, *_IN_THE_REQUEST) or not is_typed(context, name):
            continue
        value = context.params[name]
        if parameter.param_type_name == "argument":
            yield from map(str, value)
        elif isinstance(value, bool):
            yield parameter.opts[0]
        else:
            for each in value if isinstance(value, (list, tuple)) else [value]:
                yield from (parameter.opts[0], str(each))


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def _refuse(sentence: str, names: tuple[str, ...], given: dict[str, Any]) -> None:
    refused = ", ".join(_dashed(name) for name in names if name in given)
    require(not refused, f"launch: {sentence} {refused}")
