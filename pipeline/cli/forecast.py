"""`spiketrain show`, `probe`, `sweep` and `plan`: the costs of a recipe before any training."""

import json
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer

from pipeline.cli.options import (
    CLUSTER,
    COMPARE,
    TRAIN,
    Commands,
    Cores,
    Format,
    RecipeFile,
    Sets,
    Tiny,
    Workers,
    count_option,
    example,
    load_changed,
    number_option,
)
from pipeline.core.checks import parse_time_steps, require
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.suite import Suite

NodeGbps = Annotated[
    float,
    number_option("--node-gbps", min=0.001, max=1e6, help="bandwidth between nodes, in Gb/s"),
]
Price = Annotated[
    float | None,
    number_option("--price", min=0, max=1e9, help="price of one worker per hour, in your currency"),
]
Samples = Annotated[
    int | None,
    typer.Option(
        "--samples",
        min=1,
        help="samples per epoch; default: those of the data, if the data are on this machine",
    ),
]
Memory = Annotated[
    float | None,
    typer.Option(
        "--memory",
        metavar="GB",
        help="memory for the largest batch, with --batch auto; default: the free memory",
    ),
]
AtLargest = Annotated[
    bool,
    typer.Option(
        "--at-largest",
        help="with --batch auto: find each rule's largest batch by training on several sizes",
    ),
]
commands = Commands()


@commands.command(rich_help_panel=TRAIN, epilog=example("spiketrain show fashion/sltt --workers 2"))
def show(
    recipe: RecipeFile,
    workers: Workers = 1,
    changes: Sets = [],  # noqa: B006
    tiny: Tiny = False,
) -> None:
    """Print the resolved recipe, its size and the cost of a step.

    The study key and DeepSpeed's settings are also printed. The data are not needed: the operations
    and bytes of a step are counted without running it.
    """
    workload = load_changed(recipe, changes, tiny)
    from pipeline.report.forecasts import show_recipe

    show_recipe(workload, workers)


@commands.command(rich_help_panel=COMPARE, epilog=example("spiketrain probe fashion/sltt"))
def probe(
    recipe: RecipeFile,
    batch: Annotated[
        int | None,
        typer.Option("--batch", min=1, help="samples; default: the micro-batch of one worker"),
    ] = None,
    cpus_per_worker: Cores = "auto",
    format_: Format = "table",
    changes: Sets = [],  # noqa: B006
    tiny: Tiny = False,
) -> None:
    """Measure cost and gradient of each rule on one batch.

    Each gradient is compared with BPTT's. The cost is that of one batch on this machine. Recipes of
    one file that differ only in their rules share a table.
    """
    workload = load_changed(recipe, changes, tiny)
    from pipeline.forecast.bench import step_inputs
    from pipeline.forecast.probe import probe as probe_recipe
    from pipeline.report.forecasts import print_probe, probe_to_json

    _print(
        workload,
        partial(probe_recipe, batch_size=batch, threads=_threads(cpus_per_worker)),
        step_inputs,
        print_probe if format_ == "table" else probe_to_json,
        as_json=format_ == "json",
    )


@commands.command(
    rich_help_panel=COMPARE,
    epilog=example("spiketrain sweep fashion/sltt --steps 1,2,4,8,16 --batch auto"),
)
def sweep(
    recipe: RecipeFile,
    steps: Annotated[
        str, typer.Option("--steps", metavar="T,...", help="numbers of time steps")
    ] = "1,2,4,8,16",
    batch: Annotated[
        str | None,
        count_option(
            "--batch",
            noun="samples",
            metavar="N|auto",
            help="samples; default: one worker's micro-batch; auto: also estimate the largest batch"
            " that fits",
        ),
    ] = None,
    memory: Memory = None,
    at_largest: AtLargest = False,
    cpus_per_worker: Cores = "auto",
    format_: Format = "table",
    changes: Sets = [],  # noqa: B006
    tiny: Tiny = False,
) -> None:
    """Measure memory and time of each rule at several time steps T."""
    given = "without --batch" if batch is None else f"with --batch {batch}"
    if memory is not None and (batch != "auto" or not 1e-6 <= memory <= 1e6):
        raise ValueError(
            f"sweep: --memory is a limit in GB, from 1e-6 to 1e6, for --batch auto; got {memory:g}"
            f" {given}"
        )
    require(
        not at_largest or batch == "auto",
        f"sweep: --at-largest needs --batch auto; got --at-largest {given}",
    )
    time_steps = parse_time_steps("sweep", steps)
    workload = load_changed(recipe, changes, tiny)
    from pipeline.forecast.bench import step_inputs
    from pipeline.forecast.sweep import Sweep
    from pipeline.forecast.sweep import sweep as sweep_recipe
    from pipeline.report.forecasts import print_sweep

    limit = "free" if memory is None else int(memory * 1e9)
    options: dict[str, Any] = {
        "steps": time_steps,
        "batch_size": None if batch == "auto" else batch,
        "memory_bytes": limit if batch == "auto" else None,
        "at_largest": at_largest,
        "threads": _threads(cpus_per_worker),
    }
    _print(
        workload,
        partial(sweep_recipe, **options),
        step_inputs,
        print_sweep if format_ == "table" else Sweep.to_json,
        as_json=format_ == "json",
    )


@commands.command(
    rich_help_panel=CLUSTER,
    epilog=example(
        "spiketrain plan recipes/imagenet/nf_resnet34_sltt.py --workers 8 --device h100"
    ),
)
def plan(
    recipe: RecipeFile,
    device: Annotated[str, typer.Option("--device", metavar="CARD", help="a GPU such as h100")],
    workers: Workers = 1,
    per_node: Annotated[int, typer.Option("--per-node", min=1, help="GPUs per node")] = 8,
    node_gbps: NodeGbps = 400.0,
    price: Price = None,
    samples: Samples = None,
    format_: Format = "table",
    changes: Sets = [],  # noqa: B006
    tiny: Tiny = False,
) -> None:
    """Predict memory, hours and energy of each rule on GPUs of a type.

    The operations of a full-size step are counted without running it, so neither a GPU nor the data
    are needed. Recipes of one file that differ only in their rules share a table.
    """
    workload = load_changed(recipe, changes, tiny)
    from pipeline.forecast.plan import DEVICES, Cluster, plan_inputs
    from pipeline.forecast.plan import plan as plan_recipe
    from pipeline.report.forecasts import plan_to_json, print_plan

    require(device in DEVICES, f"plan: --device must be one of {', '.join(DEVICES)}; got {device}")
    cluster = Cluster(
        workers=workers,
        device=DEVICES[device],
        per_node=per_node,
        node_link=node_gbps * 1e9 / 8,
        price=price,
    )
    predict = partial(plan_recipe, cluster=cluster, samples=samples)
    as_json = format_ == "json"
    _print(workload, predict, plan_inputs, plan_to_json if as_json else print_plan, as_json=as_json)


def _print(
    workload: Recipe | Suite,
    forecast: Callable[..., Any],
    group_key: Callable[[Recipe], object],
    show: Callable[[Any], Any],
    *,
    as_json: bool,
) -> None:
    """Print the forecast of a recipe, or of each group of several recipes.

    With `as_json`, several recipes give one list.

    Args:
        forecast: called with a recipe, and with the keyword `rules` for further rules.
        group_key: recipes with equal keys form a group, which shares a forecast.
        show: prints a forecast as a table, or returns its JSON.
    """
    from pipeline.forecast.bench import RULES, group_by_inputs
    from pipeline.train.build import with_placeholder_weights

    if isinstance(workload, Recipe):
        output = show(forecast(workload))
        if as_json:
            _print_json(output)
        return
    with with_placeholder_weights(workload) as recipes:
        forecasts = (
            forecast(each, rules=(*RULES, *rules))
            for each, rules in group_by_inputs(recipes, group_key)
        )
        if as_json:
            _print_json([show(each) for each in forecasts])
        else:
            for index, each in enumerate(forecasts):
                if index:
                    print(flush=True)
                show(each)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, allow_nan=False), flush=True)


def _threads(cores: Any) -> int:
    """The torch threads of one worker: `cores`, or with `auto` as many as in a launch."""
    if cores != "auto":
        return cores
    import torch

    from pipeline.core.cpu_affinity import cores_here
    from pipeline.launch.cluster import cores_and_loader_threads

    return cores_and_loader_threads(
        [{"CPU": float(cores_here()), "GPU": float(torch.cuda.device_count())}],
        uses_gpus=torch.cuda.is_available(),
        loader_threads=1,
    )[0]
