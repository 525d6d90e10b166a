"""`spiketrain sync` and `register`: what goes to MLflow by hand. As in `__main__`, nothing heavy is
imported before they run.
"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from pipeline.cli.options import RUNS, RunName, RunOrSuite, Runs
from pipeline.core.units import counted


def add_track_commands(app: typer.Typer) -> None:
    app.command(epilog="Example: spiketrain sync fashion-sltt-20260105-120000")(sync)
    app.command(
        epilog="Example: spiketrain register fashion-sltt-20260105-120000 --as fashion --which best"
    )(register)


def sync(run: RunOrSuite, runs: Runs = RUNS) -> None:
    """Deliver to MLflow what it has missed of a run, or of each run of a suite."""
    from pipeline.recipe.suite import is_suite, runs_of
    from pipeline.report.runs import find_run_or_suite
    from pipeline.track.connect import without_password
    from pipeline.track.mlflow import sync as sync_run
    from pipeline.track.mlflow import tracking_uri
    from pipeline.track.state import state_of

    found = find_run_or_suite(runs, run)
    uri = tracking_uri(found.parent)
    begun = (
        [each for each in runs_of(found).values() if state_of(each) != "new"]
        if is_suite(found)
        else [found]
    )
    for folder in begun:
        report = sync_run(folder, uri=uri)
        told = f"{counted(report.delivered, 'point')} delivered, {report.already_there} were there"
        print(f"{folder.name} -> {without_password(uri)}: {told}")
    if not begun:
        print(f"{found.name}: none of its runs has begun")


def register(
    run: RunName,
    name: Annotated[
        str,
        typer.Option("--as", metavar="NAME", help="of the registered model; it is made if need be"),
    ],
    which: Annotated[
        Literal["last", "best"],
        typer.Option("--which", help="checkpoint; also the version's alias"),
    ] = "last",
    runs: Runs = RUNS,
) -> None:
    """Make a run's checkpoint a version of a registered model in MLflow, by its address: nothing is
    uploaded.
    """
    from pipeline.report.runs import find_run
    from pipeline.track.mlflow import tracking_uri
    from pipeline.track.publish import register as register_run
    from pipeline.train.checkpoint import Folder, pin, verified
    from pipeline.train.weights import place_of

    folder = find_run(runs, run)
    place = place_of(folder)
    if not isinstance(place, Folder):
        raise ValueError(
            "register: a checkpoint must be in a folder, where it can be pinned; got"
            f" {place.address('')}"
        )
    checkpoint = verified(place, which)
    pin(checkpoint)  # first: a run that still trains prunes
    version = register_run(
        folder, checkpoint, name=name, alias=which, uri=tracking_uri(folder.parent)
    )
    print(
        f"{folder.name} -> models:/{name}@{which}, version {version}:"
        f" {checkpoint.resolve().as_uri()}"
    )
