"""`spiketrain compare`, `report`, `dashboard` and `runs`, which read results."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli.options import (
    COMPARE,
    RUNS,
    TRAIN,
    Commands,
    Runs,
    Trust,
    example,
    is_set_by_user,
    number_option,
    run_names,
)
from pipeline.core.stages import say_stage

Names = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="STUDY|RUN|SUITE",
        autocompletion=run_names,
        help="several studies or runs, or one suite; default: the newest study",
    ),
]
Against = Annotated[str, typer.Option("--against", metavar="RULE", help="the baseline rule")]
Within = Annotated[
    float,
    number_option(
        "--within", help="tolerated drop below the baseline, in points of top-1 (paired seeds)"
    ),
]


commands = Commands()


@commands.command(rich_help_panel=COMPARE, epilog=example("spiketrain compare --format json"))
def compare(
    names: Names = None,
    against: Against = "BPTT",
    within: Within = 0.7,
    format_: Annotated[Literal["table", "json", "csv"], typer.Option("--format")] = "table",
    runs: Runs = RUNS,
    trust: Trust = [],  # noqa: B006  (typer reads the default, nothing changes it)
) -> None:
    """Print accuracy and cost of each rule, beside the baseline's.

    The baseline is that of the same study. If a suite has its own report, this report is printed.
    """
    from pipeline.report.compare import print_comparison
    from pipeline.report.selection import locate
    from pipeline.report.suite import print_suite

    runs, suite = locate(runs, names or [])
    if suite is None:
        print_comparison(runs, names or [], format=format_, against=against, within=within)
        return
    print_suite(suite, against=against, within=within, format=format_, trust=tuple(trust))


@commands.command(
    rich_help_panel=COMPARE, epilog=example("spiketrain report claims-fashion-20260105-120000")
)
def report(
    names: Names = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="default: report.html of the suite, or a file in --runs"
        ),
    ] = None,
    sweep: Annotated[
        list[Path] | None,
        typer.Option(
            "--sweep",
            metavar="FILE",
            help="output of sweep --format json, to draw memory against T; repeatable",
        ),
    ] = None,
    against: Against = "BPTT",
    within: Within = 0.7,
    runs: Runs = RUNS,
    trust: Trust = [],  # noqa: B006
) -> None:
    """Write the comparison as one HTML page, with figures.

    The page needs no network. MLflow stores it with each suite that launched one of the runs.
    """
    from pipeline.report.page import publish, write
    from pipeline.report.suite import read_study

    say_stage("reading the runs")
    result = read_study(
        runs,
        names or [],
        against=against,
        within=within,
        sweeps=sweep or [],
        trust=tuple(trust),
    )
    say_stage("drawing the page")
    page = write(result.study, out or result.place)
    print(page)
    if not publish(result, page):
        print("no artifact in MLflow: these runs belong to no suite", file=sys.stderr)


@commands.command(
    rich_help_panel=COMPARE, epilog=example("spiketrain dashboard --store sqlite:///runs/mlflow.db")
)
def dashboard(
    context: typer.Context,
    store: Annotated[
        str | None,
        typer.Option(
            "--store", metavar="URI", help="MLflow's tracking URI; default: the URI of --runs"
        ),
    ] = None,
    runs: Runs = RUNS,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free port")] = 8050,
    host: Annotated[
        str, typer.Option("--host", help="an address other than loopback needs --token")
    ] = "127.0.0.1",
    token: Annotated[
        str | None,
        typer.Option(
            "--token",
            envvar="SPIKETRAIN_TOKEN",
            help="secret that each visitor needs to open the page",
        ),
    ] = None,
    every: Annotated[
        float,
        number_option(
            "--every",
            metavar="SECONDS",
            min=0.5,
            max=86_400,
            help="time between queries of the store",
        ),
    ] = 5.0,
) -> None:
    """Serve the comparison in the browser, live while runs train.

    The dashboard shows all studies of an MLflow store.
    """
    if store is not None and is_set_by_user(context, "runs"):
        raise ValueError(
            f"dashboard: --store names the store, so --runs has no effect; got --runs {runs}"
            f" with --store {store}"
        )
    from pipeline.report.dashboard.app import serve

    serve(store=store, runs=runs, host=host, port=port, token=token, every=every)


@commands.command(
    "runs", rich_help_panel=TRAIN, epilog=example("spiketrain runs --runs /scratch/runs")
)
def runs_(runs: Runs = RUNS) -> None:
    """List suites and runs, and the commands that resume them."""
    from pipeline.report.selection import print_runs

    print_runs(runs)
