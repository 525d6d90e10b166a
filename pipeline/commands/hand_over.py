"""`spiketrain launch --cluster`: the launch as it was typed, handed to a scheduler instead of begun here. It needs no data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.options import is_typed

if TYPE_CHECKING:
    from pipeline.recipe import Recipe
    from pipeline.submit.order import Order
    from pipeline.suite import Suite

_PANEL = "Handed to a cluster"
_INFRA = Path(__file__).parents[2] / "infra"

Where = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="k8s|slurm|ray://HOST:PORT",
        help="hand the launch to Kubernetes, to Slurm, or to a Ray whose dashboard is there; its --name is the job's, too",
        rich_help_panel=_PANEL,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print what would be submitted", rich_help_panel=_PANEL)]
Image = Annotated[str, typer.Option("--image", help="k8s, required; slurm: of the container that trains", rich_help_panel=_PANEL)]
Infra = Annotated[
    Path | None,
    typer.Option(
        "--infra",
        metavar="DIR",
        help="k8s, required: templates, such as infra/k8s/overlays/SIZE/job; slurm: infra/slurm unless said",
        rich_help_panel=_PANEL,
    ),
]
Nodes = Annotated[int | None, typer.Option("--nodes", min=1, help="slurm, required: of the job", rich_help_panel=_PANEL)]
Gpus = Annotated[int | None, typer.Option("--gpus-per-node", min=0, help="slurm", rich_help_panel=_PANEL)]
Time = Annotated[
    str | None, typer.Option("--time", help="slurm, required: such as 12:00:00, after which it goes on", rich_help_panel=_PANEL)
]
Partition = Annotated[str | None, typer.Option("--partition", help="slurm", rich_help_panel=_PANEL)]

_OPTIONS = ("cluster", "dry_run", "image", "infra", "nodes", "gpus_per_node", "time", "partition")
_OF_SLURM = ("nodes", "gpus_per_node", "time", "partition")
_REQUIRED = {"k8s": ("image", "infra"), "slurm": ("nodes", "time")}
_IN_THE_ORDER = ("name", "runs", "workers")


def hand_over(context: typer.Context, made: Recipe | Suite, *, workers: int | tuple[int, ...], trust: tuple[str, ...]) -> bool:
    """Whether the launch of `context`, of what it has `made`, was for a cluster, and so is done: submitted, or printed.

    Raises:
        ValueError: options that do not go together, what the scheduler would not take, or a recipe that the launch itself would
            refuse there, as far as that can be told without data.
        Refused: the scheduler did not take the job.
    """
    given = {name: value for name, value in context.params.items() if is_typed(context, name)}
    where = given.get("cluster")
    if where is None:
        _refuse("without --cluster there is nothing that takes", [name for name in _OPTIONS if name in given])
        return False
    if where not in ("k8s", "slurm") and not where.startswith("ray://"):
        raise ValueError(f"launch: --cluster must be k8s, slurm or ray://HOST:PORT; got {where}")
    # What a lost node means was settled when a cluster's head was started, by the templates of infra/ in two of three.
    foreign = {"k8s": (*_OF_SLURM, "node_loss"), "slurm": ("node_loss",)}.get(where, (*_OF_SLURM, "infra"))
    _refuse(f"--cluster {where} does not take", [name for name in foreign if name in given])
    if "name" not in given:
        raise ValueError("launch: --cluster needs a --name, by which the job goes on with its run; got none")
    missing = [name for name in _REQUIRED.get(where, ()) if name not in given]
    if missing:
        needs = " and ".join(map(_option, _REQUIRED[where]))
        raise ValueError(f"launch: --cluster {where} needs {needs}; got no {', '.join(map(_option, missing))}")
    # Where nothing was said Slurm's script takes what there is: one worker is no wish of anybody's.
    order = _order(where, context, given, workers=None if where == "slurm" and "workers" not in given else workers)
    rendered, submit = _rendered(where, order, given)
    sizes = order.sizes or (given["nodes"] * (given.get("gpus_per_node") or 1),)  # as infra/slurm/train.sbatch counts
    _check(made, sizes, trust=trust)
    typer.echo(rendered if given.get("dry_run") else submit(rendered))
    return True


def _order(where: str, context: typer.Context, given: dict[str, Any], *, workers: int | tuple[int, ...] | None) -> Order:
    from pipeline.submit.order import Order

    return Order(
        words=tuple(_words(context)),
        name=given["name"],
        workers=workers,
        image=given.get("image", ""),
        runs=str(given.get("runs", "/shared/runs" if where == "k8s" else "runs")),
        infra=given.get("infra", _INFRA / "slurm" if where == "slurm" else _INFRA),
    )


def _rendered(where: str, order: Order, given: dict[str, Any]) -> tuple[str, Any]:
    from pipeline.submit import k8s, ray_job, slurm

    if where == "k8s":
        return k8s.render(order), k8s.submit
    if where == "slurm":
        asked = {"nodes": given["nodes"], "gpus_per_node": given.get("gpus_per_node", 0), "time": given["time"]}
        return slurm.render(order, **asked, partition=given.get("partition")), slurm.submit
    return ray_job.render(order, address=where), ray_job.submit


def _check(made: Recipe | Suite, sizes: tuple[int, ...], *, trust: tuple[str, ...]) -> None:
    """Here and not after hours in a queue. A file that a recipe begins from may lie on the cluster alone."""
    from dataclasses import replace

    from pipeline.build import check_recipe
    from pipeline.stand_in import with_stand_ins
    from pipeline.suite import Suite, refuse_references, refuse_untrusted

    if not isinstance(made, Suite):
        refuse_references(made)
    suite = made if isinstance(made, Suite) else Suite((made,))
    refuse_untrusted(suite, trust)
    with with_stand_ins(suite) as recipes:
        for recipe in recipes:
            is_there = recipe.init is not None and Path(recipe.init).exists()
            check_recipe(replace(recipe.with_untrained_teacher(), init=recipe.init if is_there else None), *sizes)


def _words(context: typer.Context) -> Iterator[str]:
    """What was typed, but for what is in the order: recipes first."""
    parameters = [each for each in context.command.params if each.name is not None and is_typed(context, each.name)]
    for parameter in sorted(parameters, key=lambda each: each.param_type_name == "option"):
        value = context.params[parameter.name or ""]
        if parameter.name in (*_OPTIONS, *_IN_THE_ORDER):
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        if parameter.param_type_name == "argument":
            yield from map(str, values)
        elif isinstance(value, bool):
            yield parameter.opts[0]
        else:
            yield from (word for each in values for word in (parameter.opts[0], str(each)))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _refuse(sentence: str, names: list[str]) -> None:
    if names:
        raise ValueError(f"launch: {sentence} {', '.join(map(_option, names))}")
