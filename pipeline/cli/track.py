"""`spiketrain sync` and `register` fill MLflow's tracking store and its model registry; `doctor`
checks what a training needs.
"""

import sys
from typing import Annotated, Literal

import typer

from pipeline.cli.options import (
    CLUSTER,
    MODELS,
    RUNS,
    Commands,
    RunName,
    RunOrSuite,
    Runs,
    example,
)
from pipeline.core.printing import new_console, say
from pipeline.core.units import counted
from pipeline.recipe.suite import is_suite, runs_of
from pipeline.track.mlflow_store import without_password
from pipeline.track.run_state import state_of

commands = Commands()


@commands.command(
    rich_help_panel=CLUSTER, epilog=example("spiketrain sync fashion-sltt-20260105-120000")
)
def sync(run: RunOrSuite, runs: Runs = RUNS) -> None:
    """Send a run, or each run of a suite, to MLflow.

    Points that MLflow already has are skipped.
    """
    from pipeline.report.selection import find_run
    from pipeline.track import mlflow

    console, target = new_console(), find_run(runs, run, suites=True)
    uri = mlflow.tracking_uri(target.parent)
    folders = [target]
    if is_suite(target):
        folders = [each for each in runs_of(target).values() if state_of(each) != "new"]
    for folder in folders:
        delivery = mlflow.sync(folder, uri=uri)
        say(
            console,
            f"{folder.name} -> {without_password(uri)}: {counted(delivery.delivered, 'point')}"
            f" delivered, {delivery.translation.already_there} already there",
        )
    if not folders:
        print(f"{target.name}: no run of this suite has begun")


@commands.command(
    rich_help_panel=MODELS,
    epilog=example("spiketrain register fashion-sltt-20260105-120000 --as fashion --which best"),
)
def register(
    run: RunName,
    name: Annotated[
        str,
        typer.Option(
            "--as",
            metavar="NAME",
            help="name of the registered model, created if it does not exist",
        ),
    ],
    which: Annotated[
        Literal["last", "best"],
        typer.Option("--which", help="checkpoint to register; also the alias of the version"),
    ] = "last",
    runs: Runs = RUNS,
) -> None:
    """Register a checkpoint as a version of a model in MLflow.

    The checkpoint itself is not uploaded: MLflow gets its address.
    """
    from pipeline.report.selection import find_run
    from pipeline.track import mlflow
    from pipeline.train.checkpoint import pin, verified_checkpoint
    from pipeline.train.weights import store_of

    folder = find_run(runs, run)
    store = store_of(folder)
    if store.folder is None:
        raise ValueError(
            "register: the checkpoint must be in a folder, so that it can be pinned; got"
            f" {store.address('')}"
        )
    checkpoint = verified_checkpoint(store, which)
    pin(checkpoint)  # first, because a run that is still training deletes old checkpoints
    version = mlflow.register(
        folder, checkpoint, name=name, alias=which, uri=mlflow.tracking_uri(folder.parent)
    )
    say(
        new_console(),
        f"{folder.name} -> models:/{name}@{which}, version {version}:"
        f" {checkpoint.resolve().as_uri()}",
    )


@commands.command(
    rich_help_panel=CLUSTER, epilog=example("spiketrain doctor --address auto --runs /shared/runs")
)
def doctor(
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help=(
                "address of the Ray cluster to check, such as auto or host:6379; local, the"
                " default, is this machine"
            ),
        ),
    ] = None,
    runs: Runs = RUNS,
    checkpoints: Annotated[
        str | None,
        typer.Option(
            "--checkpoints",
            metavar="DIR|URI",
            help="folder or address of checkpoints; each node tries to write there",
        ),
    ] = None,
) -> None:
    """Check this machine, or a cluster, and advise what to repair.

    With --address each node of a Ray cluster is checked. The exit code is 1 if a training run would
    fail, or if MLflow cannot be used.
    """
    from pipeline.launch.preflight import preflight, print_findings

    findings = preflight(runs, address=address, checkpoints=checkpoints)
    print_findings(findings)
    sys.exit(any(each.state == "bad" for each in findings))
