"""`spiketrain launch --cluster`: submit a launch to a scheduler, with the options of the user.

The data need not be on this machine.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.options import is_set_by_user
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
            "submit the launch to Kubernetes, Slurm, or the Ray cluster with this dashboard; --name"
            " also names the job"
        ),
    ),
]
DryRun = Annotated[bool, _option("--dry-run", help="print the job, and do not submit it")]
Image = Annotated[
    str,
    _option("--image", help="k8s, required: the container image that trains; optional for slurm"),
]
Infra = Annotated[
    Path | None,
    _option(
        "--infra",
        metavar="DIR",
        help=(
            "k8s, required: a kustomize folder: SIZE/job in infra/k8s/overlays; for slurm, a folder"
            " with a train.sbatch (default infra/slurm)"
        ),
    ),
]
Nodes = Annotated[int | None, _option("--nodes", min=1, help="slurm, required: number of nodes")]
Gpus = Annotated[int | None, _option("--gpus-per-node", min=0, help="slurm: GPUs per node")]
Time = Annotated[
    str | None,
    _option(
        "--time", help="slurm, required: time limit, such as 12:00:00; the job is resumed after it"
    ),
]
Partition = Annotated[str | None, _option("--partition", help="slurm: the partition")]

_SLURM_OPTIONS = ("nodes", "gpus_per_node", "time", "partition")
_OPTIONS = ("cluster", "dry_run", "image", "infra", *_SLURM_OPTIONS)
_REQUIRED = {"k8s": ("image", "infra"), "slurm": ("nodes", "time")}
# Fields of the request set these options of the launch.
_REQUEST_OPTIONS = ("name", "runs", "workers")
# The job sets these options: it trains on a Ray cluster, and resumes a run of the same name.
_JOB_OPTIONS = ("inline", "address", "or_resume")


def submit_to_cluster(
    context: typer.Context,
    workload: Recipe | Suite,
    *,
    sizes: tuple[int, ...],
    trust: tuple[str, ...],
) -> bool:
    """Submit a launch to the scheduler of --cluster, or print the job with --dry-run.

    Args:
        sizes: the numbers of workers of the launch.

    Returns: whether --cluster is set. Without it, the launch trains from here.

    Raises:
        ValueError: options do not fit together, the scheduler would refuse a value, or the recipe
            is invalid. The check does not need the data.
        UserError: the scheduler did not take the job.
    """
    typed = {name: value for name, value in context.params.items() if is_set_by_user(context, name)}
    scheduler = typed.get("cluster")
    if scheduler is None:
        _refuse("options that need --cluster:", _OPTIONS, typed)
        return False
    require(
        scheduler in ("k8s", "slurm") or scheduler.startswith("ray://"),
        f"launch: --cluster must be k8s, slurm or ray://HOST:PORT; got {scheduler}",
    )
    # The files in infra/ set --node-loss, so the user must not set it.
    unsupported = {"k8s": (*_SLURM_OPTIONS, "node_loss"), "slurm": ("node_loss",)}
    _refuse(
        f"--cluster {scheduler} does not accept",
        (*_JOB_OPTIONS, *unsupported.get(scheduler, (*_SLURM_OPTIONS, "infra"))),
        typed,
    )
    require("name" in typed, "launch: --cluster needs a --name to resume the job; got none")
    required = _REQUIRED.get(scheduler, ())
    missing = ", ".join(_dashed(name) for name in required if name not in typed)
    needs = " and ".join(map(_dashed, required))
    require(not missing, f"launch: --cluster {scheduler} needs {needs}; got no {missing}")
    from pipeline.launch import schedulers

    request = schedulers.LaunchRequest(
        words=tuple(_typed_words(context)),
        name=typed["name"],
        # Without --workers, Slurm's script counts the GPUs.
        sizes=() if scheduler == "slurm" and "workers" not in typed else sizes,
        runs=str(typed.get("runs", "/shared/runs" if scheduler == "k8s" else "runs")),
        options=typed,
    )
    render, submit = {
        "k8s": (schedulers.render_rayjob, schedulers.submit_rayjob),
        "slurm": (schedulers.render_sbatch, schedulers.submit_sbatch),
    }.get(scheduler, (schedulers.render_ray_job, schedulers.submit_ray_job))
    rendered = render(request)
    _check_recipes(
        workload, request.sizes or (typed["nodes"] * max(typed.get("gpus_per_node", 0), 1),), trust
    )
    typer.echo(rendered if typed.get("dry_run") else submit(rendered))
    return True


def _check_recipes(
    workload: Recipe | Suite, sizes: tuple[int, ...], trust: tuple[str, ...]
) -> None:
    """Refuse an invalid recipe now, not after hours in a queue.

    Initial weights are checked only if their file exists here.
    """
    from pipeline.train.build import check_recipe, with_placeholder_weights

    if not isinstance(workload, Suite):
        refuse_references(workload)
    suite = workload if isinstance(workload, Suite) else Suite((workload,))
    refuse_untrusted(suite, trust)
    with with_placeholder_weights(suite) as recipes:
        for recipe in recipes:
            has_weights = recipe.init is not None and Path(recipe.init).exists()
            checked = recipe if has_weights else replace(recipe, init=None)
            check_recipe(checked.with_untrained_teacher(), *sizes)


def _typed_words(context: typer.Context) -> Iterator[str]:
    """The user's words, recipes first, without options of submission and fields of the request."""
    for parameter in sorted(
        context.command.params, key=lambda each: each.param_type_name == "option"
    ):
        name = parameter.name or ""
        if name in (*_OPTIONS, *_REQUEST_OPTIONS) or not is_set_by_user(context, name):
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


def _refuse(reason: str, names: tuple[str, ...], typed: dict[str, Any]) -> None:
    refused = ", ".join(_dashed(name) for name in names if name in typed)
    require(not refused, f"launch: {reason} {refused}")
