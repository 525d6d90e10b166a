"""`spiketrain evaluate` and `export`: commands for a trained network."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli.options import (
    RUNS,
    Commands,
    RunName,
    Runs,
    Sets,
    Trust,
    is_set_by_user,
    load_changed,
)
from pipeline.recipe.recipe_files import trust_of

commands = Commands()


@commands.command(
    epilog=(
        "Example: spiketrain evaluate fashion-sltt-20260105-120000 --which best; "
        "spiketrain evaluate recipes/imagenet/qkformer_10_384_bptt.py --weights published.pth"
    )
)
def evaluate(
    context: typer.Context,
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN|RECIPE",
            help="folder of a run, or its name under --runs; with --weights also a recipe file",
        ),
    ],
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            metavar="FILE",
            help=(
                "evaluate the weights in this file: an export, a state_dict (.safetensors or"
                " torch.save), or published weights of QKFormer"
            ),
        ),
    ] = None,
    which: Annotated[
        Literal["last", "best"] | None,
        typer.Option("--which", help="checkpoint to evaluate; default: last"),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--time-steps", min=1, help="evaluate at another number of time steps"),
    ] = None,
    runs: Runs = RUNS,
    changes: Sets = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Evaluate the network of a run or a recipe on its whole evaluation set, in this process."""
    from pipeline.launch.evaluate import evaluate_recipe, evaluate_run

    if run.endswith(".py"):
        if is_set_by_user(context, "runs"):
            raise ValueError(
                f"evaluate: --runs has no effect with a recipe file; got {run} with --runs {runs}"
            )
        recipe = load_changed(Path(run), changes, tiny=False)
        evaluate_recipe(
            recipe,
            which=which,
            weights=weights,
            time_steps=steps,
            own=trust_of(recipe, [Path(run)]),
            trust=tuple(trust),
        )
        return
    from pipeline.report.selection import find_run

    if changes:
        raise ValueError(
            f"evaluate: --set must come with a recipe file; got the run {run} with --set"
            f" {changes[0]}"
        )
    evaluate_run(
        find_run(runs, run), which=which, weights=weights, time_steps=steps, trust=tuple(trust)
    )


@commands.command(epilog="Example: spiketrain export fashion-sltt-20260105-120000")
def export(
    run: RunName,
    packed: Annotated[
        bool,
        typer.Option(
            "--packed",
            help="pack 1-bit weights, 8 to a byte; the network must have 1-bit weights",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="a new .safetensors file; default: a file in the run's folder",
        ),
    ] = None,
    which: Annotated[
        Literal["last", "best"], typer.Option("--which", help="checkpoint to export")
    ] = "last",
    runs: Runs = RUNS,
    trust: Trust = [],  # noqa: B006
) -> None:
    """Write a trained network as one file for pipeline.load.

    The size of the file is printed, and the line that loads it.
    """
    from pipeline.report.selection import find_run
    from pipeline.train.export import export_run

    print(
        export_run(
            find_run(runs, run),
            out,
            layout="packed" if packed else "plain",
            which=which,
            trust=tuple(trust),
        )
    )
