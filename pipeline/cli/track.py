"""`spiketrain sync` and `register`, which send to MLflow."""

from typing import Annotated, Literal

import typer

from pipeline.cli.options import RUNS, Commands, RunName, RunOrSuite, Runs
from pipeline.core.units import counted
from pipeline.recipe.suite import is_suite, runs_of
from pipeline.track.mlflow_store import without_password
from pipeline.track.run_state import state_of

commands = Commands()


@commands.command(epilog="Example: spiketrain sync fashion-sltt-20260105-120000")
def sync(run: RunOrSuite, runs: Runs = RUNS) -> None:
    """Deliver to MLflow what it lacks of a run, or of each run of a suite."""
    from pipeline.report.selection import find_run
    from pipeline.track import mlflow

    target = find_run(runs, run, suites=True)
    uri = mlflow.tracking_uri(target.parent)
    begun = (
        [each for each in runs_of(target).values() if state_of(each) != "new"]
        if is_suite(target)
        else [target]
    )
    for folder in begun:
        report = mlflow.sync(folder, uri=uri)
        print(
            f"{folder.name} -> {without_password(uri)}: {counted(report.delivered, 'point')}"
            f" delivered, {report.already_there} were there"
        )
    if not begun:
        print(f"{target.name}: none of its runs has begun")


@commands.command(
    epilog="Example: spiketrain register fashion-sltt-20260105-120000 --as fashion --which best"
)
def register(
    run: RunName,
    name: Annotated[
        str,
        typer.Option(
            "--as", metavar="NAME", help="of the registered model; it is made if it does not exist"
        ),
    ],
    which: Annotated[
        Literal["last", "best"],
        typer.Option("--which", help="checkpoint; also the version's alias"),
    ] = "last",
    runs: Runs = RUNS,
) -> None:
    """Register a run's checkpoint as a version of a model in MLflow. Its address is registered, and
    nothing is uploaded.
    """
    from pipeline.report.selection import find_run
    from pipeline.track import mlflow
    from pipeline.train.checkpoint import pin, verified_checkpoint
    from pipeline.train.weights import store_of

    folder = find_run(runs, run)
    place = store_of(folder)
    if place.folder is None:
        raise ValueError(
            "register: a checkpoint must be in a folder, where it can be pinned; got"
            f" {place.address('')}"
        )
    checkpoint = verified_checkpoint(place, which)
    pin(checkpoint)  # before it is registered: a run that still trains deletes old checkpoints
    version = mlflow.register(
        folder, checkpoint, name=name, alias=which, uri=mlflow.tracking_uri(folder.parent)
    )
    print(
        f"{folder.name} -> models:/{name}@{which}, version {version}:"
        f" {checkpoint.resolve().as_uri()}"
    )
