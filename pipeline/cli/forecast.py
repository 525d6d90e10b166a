"""`spiketrain show`, `probe`, `sweep` and `plan`: what can be told before any training."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from pipeline.cli.options import (
    RUNS,
    Cpus,
    RecipeFile,
    Runs,
    Sets,
    Tiny,
    Workers,
    count_or_auto,
    is_typed,
    made_of,
    number_option,
    only_recipe,
)

Format = Annotated[Literal["table", "json"], typer.Option("--format")]

_PLAN = (
    "Example: spiketrain plan recipes/imagenet/qkformer_10_384_sltt_k1.py --workers 64 --device"
    " h100 --batch-of noise --samples 1281167"
)


def add_forecast_commands(app: typer.Typer) -> None:
    app.command(epilog="Example: spiketrain show recipes/fashion/sltt.py --workers 2")(show)
    app.command(epilog="Example: spiketrain probe recipes/fashion/sltt.py")(probe)
    app.command(
        epilog="Example: spiketrain sweep recipes/fashion/sltt.py --steps 1,2,4,8,16 --batch auto"
    )(sweep)
    app.command(epilog=_PLAN)(plan)


def show(
    recipe: RecipeFile,
    workers: Workers = 1,
    set_: Sets = [],  # noqa: B006
    tiny: Tiny = False,
) -> None:
    """Print the resolved recipe, its size, its study and the DeepSpeed settings; needs no data."""
    made = made_of(recipe, set_, tiny)
    from pipeline.report.show import show_recipe

    show_recipe(made, workers)


def probe(
    recipe: RecipeFile,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch", min=1, help="samples; without it what one worker holds at a time in training"
        ),
    ] = None,
    cpus_per_worker: Cpus = 1,
    format_: Format = "table",
    set_: Sets = [],  # noqa: B006
    tiny: Tiny = False,
) -> None:
    """Before any training: what each rule costs on this network and data, and how near its gradient
    is to BPTT's.

    Of a file of several recipes, each network has its tables; recipes that differ in their rules
    alone share them."""
    made = made_of(recipe, set_, tiny)
    from pipeline.forecast.probe import probe as probe_recipe
    from pipeline.forecast.probe import probe_all
    from pipeline.recipe.recipe import Recipe
    from pipeline.report.probe import print_probe, print_probes
    from pipeline.train.placeholder_weights import with_stand_ins

    about = {"batch_size": batch, "threads": cpus_per_worker}
    if isinstance(made, Recipe):
        print_probe(probe_recipe(made, **about), as_json=format_ == "json")
        return
    with with_stand_ins(made) as recipes:
        print_probes(probe_all(recipes, **about), as_json=format_ == "json")


def sweep(
    recipe: RecipeFile,
    steps: Annotated[
        str, typer.Option("--steps", metavar="T,...", help="numbers of time steps")
    ] = "1,2,4,8,16",
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch",
            metavar="N|auto",
            help="samples; auto: as in training, and about the largest that fits",
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            "--memory",
            metavar="GB",
            help="that the largest batch must fit into; without it what is free",
        ),
    ] = None,
    at_largest: Annotated[
        bool,
        typer.Option(
            "--at-largest",
            help="with --batch auto: find each rule's own largest batch by training it and others",
        ),
    ] = False,
    cpus_per_worker: Cpus = 1,
    format_: Format = "table",
    set_: Sets = [],  # noqa: B006
    tiny: Tiny = False,
) -> None:
    """Before any training: memory and time of each rule against the number of time steps."""
    size = None if batch is None else count_or_auto(batch, option="sweep: --batch", of="samples")
    if memory is not None and (size != "auto" or not 1e-6 <= memory <= 1e6):
        raise ValueError(
            f"sweep: --memory is a limit in GB, from 1e-6 to 1e6, for --batch auto; got {memory:g}"
            f" with --batch {batch}"
        )
    if at_largest and size != "auto":
        raise ValueError(f"sweep: --at-largest tries what --batch auto finds; got --batch {batch}")
    from pipeline.core.checks import listed_time_steps

    times = listed_time_steps("sweep", steps)
    made = only_recipe(recipe, set_, tiny, who="sweep")
    from pipeline.forecast.sweep import sweep as sweep_recipe
    from pipeline.report.sweep import print_sweep

    limit = None if size != "auto" else "free" if memory is None else int(memory * 1e9)
    samples = None if size == "auto" else size
    about = {
        "batch_size": samples,
        "memory_bytes": limit,
        "at_largest": at_largest,
        "threads": cpus_per_worker,
    }
    print_sweep(sweep_recipe(made, steps=times, **about), as_json=format_ == "json")


def plan(
    context: typer.Context,
    recipe: RecipeFile,
    workers: Workers = 1,
    device: Annotated[
        str,
        typer.Option(
            "--device", metavar="here|CARD", help="a card of the table, or machines like this"
        ),
    ] = "here",
    per_node: Annotated[
        int | None, typer.Option("--per-node", min=1, help="cards in a node; without it 8")
    ] = None,
    node_gbps: Annotated[
        float | None,
        number_option(
            "--node-gbps", min=0.001, max=1e6, help="from node to node, in Gb/s; without it 400"
        ),
    ] = None,
    cpus_per_worker: Cpus = 1,
    price: Annotated[
        float | None,
        number_option("--price", min=0, max=1e9, help="of an hour of one worker, in your currency"),
    ] = None,
    batch_of: Annotated[
        Literal["data", "noise"],
        typer.Option("--batch-of", help="noise: where the data is not here; name --samples then"),
    ] = "data",
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="of an epoch; without it the data's")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="RUN",
            help="that was trained on such a machine, or card: how far off the plan is",
        ),
    ] = None,
    runs: Runs = RUNS,
    format_: Format = "table",
    set_: Sets = [],  # noqa: B006
    tiny: Tiny = False,
) -> None:
    """Before anything is launched: memory, speed, hours and energy of each rule on machines that
    are not here. A model.
    """
    made = only_recipe(recipe, set_, tiny, who="plan")
    from pipeline.forecast.devices import DEVICES
    from pipeline.forecast.plan import Cluster
    from pipeline.forecast.plan import plan as plan_recipe
    from pipeline.report.plan import print_plan

    if device != "here" and device not in DEVICES:
        raise ValueError(f"plan: --device must be here, {', '.join(DEVICES)}; got {device}")
    if against is None and is_typed(context, "runs"):
        raise ValueError(
            f"plan: --runs is where the run of --against is found; got --runs {runs} without"
            " --against"
        )
    if batch_of == "noise" and (samples is None or device == "here"):
        raise ValueError(
            "plan: --batch-of noise needs --samples, and a card: what it takes here depends on the"
            " data"
        )
    if device == "here" and (per_node, node_gbps) != (None, None):
        raise ValueError(
            "plan: --per-node and --node-gbps are of cards in nodes; what links machines like this"
            " one is measured"
        )
    cluster = Cluster(
        workers=workers,
        device=DEVICES.get(device),
        per_node=per_node or 8,
        node_link=(node_gbps or 400.0) * 1e9 / 8,
        price=price,
        threads=cpus_per_worker,
    )
    if against is None:
        print_plan(
            plan_recipe(made, cluster, samples=samples, source=batch_of), as_json=format_ == "json"
        )
        return
    from pipeline.report.planned import errors, refuse_unless_comparable
    from pipeline.report.runs import find_run

    folder = find_run(runs, against)
    refuse_unless_comparable(made, cluster, folder)
    found = plan_recipe(made, cluster, samples=samples, source=batch_of)
    print_plan(found, against=errors(found, folder), as_json=format_ == "json")
