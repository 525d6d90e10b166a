"""`spiketrain launch` and `resume`."""

import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.options import (
    AT_A_TIME,
    RUNS,
    SIZES,
    Address,
    Commands,
    Cores,
    Device,
    Hang,
    Inline,
    Loaders,
    NodeLoss,
    Restarts,
    RunOrSuite,
    Runs,
    Sets,
    Tiny,
    Trust,
    Verify,
    count_option,
    is_typed,
    made_of,
)
from pipeline.cli.submit import (
    DryRun,
    Gpus,
    Image,
    Infra,
    Nodes,
    Partition,
    Time,
    Where,
    hand_over,
)
from pipeline.recipe.printed_commands import command
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.recipe_files import refuse_unnamed, trust_of
from pipeline.recipe.search import joined, over_seeds, parse_search, tuned
from pipeline.recipe.suite import Suite, is_suite, runs_of
from pipeline.track.mlflow_store import TrackingError
from pipeline.track.run_state import done_entries, state_of, suite_entries

if TYPE_CHECKING:
    from pipeline.launch.cluster import Cluster


RecipeFiles = Annotated[
    list[Path], typer.Argument(metavar="RECIPE...", help="Python files that define recipe()")
]
Sizes = Annotated[
    str,
    typer.Option(
        "--workers",
        metavar=SIZES,
        help="processes that train together; of several numbers, what there is room for",
    ),
]
Seeds = Annotated[
    int,
    typer.Option("--seeds", min=1, help="train each recipe so often, with consecutive seeds"),
]
Tune = Annotated[
    str | None,
    typer.Option(
        "--tune",
        metavar="KEY=V,V,...",
        help="beside it, each rule with the best of 5 values or more, such as of optimizer.lr",
    ),
]
SideBySide = Annotated[
    str | None,
    count_option(
        "--side-by-side",
        of="runs",
        metavar="N|auto",
        help=(
            f"{AT_A_TIME}; without it what there is room for, but one with --inline, --address"
            " or several numbers of workers"
        ),
    ),
]
Name = Annotated[
    str | None,
    typer.Option(
        "--name",
        help=(
            "the run's name, or the suite's; without it the recipe's, or the file's, and the time"
        ),
    ),
]
OrResume = Annotated[
    bool,
    typer.Option("--or-resume", help="continue the run or suite of this --name if it has begun"),
]
Checkpoints = Annotated[
    str | None,
    typer.Option(
        "--checkpoints",
        metavar="DIR|URI",
        help=(
            "where each run keeps its checkpoints, under its name: a folder, s3://bucket/prefix,"
            " ...; without it in its own"
        ),
    ),
]
commands = Commands()


@commands.command(
    epilog=(
        "Example: spiketrain launch recipes/fashion/sltt.py --workers 2 --set optimizer.lr=0.05"
    )
)
def launch(
    context: typer.Context,
    recipes: RecipeFiles,
    workers: Sizes = "1",
    inline: Inline = False,
    address: Address = None,
    device: Device = "auto",
    cpus_per_worker: Cores = "auto",
    loader_threads: Loaders = "auto",
    max_restarts: Restarts = 3,
    hang_minutes: Hang = 30.0,
    verify: Verify = "sampled",
    node_loss: NodeLoss = "fast",
    seeds: Seeds = 1,
    tune: Tune = None,
    side_by_side: SideBySide = None,
    runs: Runs = RUNS,
    name: Name = None,
    or_resume: OrResume = False,
    checkpoints: Checkpoints = None,
    set_: Sets = [],  # noqa: B006  (typer reads the default, nothing changes it)
    trust: Trust = [],  # noqa: B006
    tiny: Tiny = False,
    cluster: Where = None,
    dry_run: DryRun = False,
    image: Image = "",
    infra: Infra = None,
    nodes: Nodes = None,
    gpus_per_node: Gpus = None,
    time: Time = None,
    partition: Partition = None,
) -> None:
    """Train a recipe, or each recipe of a comparison, and print its table or its own report."""
    _handle_signals()
    if name is not None:
        from pipeline.launch.prepare import folder_named

        folder_named(runs, name)
    made = _comparison([made_of(recipe, set_, tiny) for recipe in recipes], seeds, tune)
    here = _cluster(context.params, made)
    refuse_unnamed(made, recipes)
    trusted = trust_of(made, recipes, trust)
    if hand_over(context, made, sizes=here.sizes, trust=trusted):
        return  # hand_over has read the options from --cluster to --partition
    if or_resume and _continued(context, made, here, trusted):
        return
    if isinstance(made, Suite):
        from pipeline.launch.suite import launch_suite

        stem = "-and-".join(file.stem.replace("_", "-") for file in recipes[:2])
        stem += "-and-more" if len(recipes) > 2 else ""
        _end_suite(launch_suite(made, here, runs, stem=stem, name=name, trust=trusted), trusted)
    else:
        from pipeline.launch.driver import launch_run

        _end_run(
            launch_run(made, here, runs, name=name, adopt_checkpoints=or_resume, trust=trusted)
        )


def _cluster(params: dict[str, Any], made: Recipe | Suite) -> "Cluster":
    from pipeline.launch.cluster import Cluster, parse_workers

    options = {each.name: params[each.name] for each in fields(Cluster)}
    options["workers"] = parse_workers(params["workers"])
    if options["side_by_side"] is None:
        # An existing Ray cluster has other users, and its CPUs may be half cores. There the user
        # sets the number of runs that train at once.
        fits = (
            isinstance(made, Suite)
            and isinstance(options["workers"], int)
            and params["address"] in (None, "local")
            and not params["inline"]
        )
        options["side_by_side"] = "auto" if fits else 1
    if options["side_by_side"] != 1 and not isinstance(made, Suite):
        raise ValueError(
            "launch: --side-by-side is for several runs; got"
            f" {params['side_by_side']} with {made.name} alone"
        )
    return Cluster(**options)


def _continued(
    context: typer.Context, made: Recipe | Suite, here: "Cluster", trust: tuple[str, ...]
) -> bool:
    runs, name = context.params["runs"], context.params["name"]
    if name is None:
        raise ValueError("launch: --or-resume needs a --name to continue; got none")
    if not (runs / name).exists():
        return False
    from pipeline.launch.cluster import OPERATIONAL_FIELDS
    from pipeline.launch.resume import refuse_unless_launched_so

    refuse_unless_launched_so(runs / name, made, here, trust=trust)
    _resume(
        runs / name,
        workers=None if here.inline else here.workers,
        inline=here.inline,
        address=context.params["address"] or (None if here.inline else "local"),
        options={
            field: getattr(here, field) for field in OPERATIONAL_FIELDS if is_typed(context, field)
        },
        trust=trust,
    )
    return True


@commands.command(epilog="Example: spiketrain resume fashion-sltt-20260105-120000")
def resume(
    context: typer.Context,
    run: RunOrSuite,
    workers: Annotated[
        str | None,
        typer.Option(
            "--workers",
            metavar=SIZES,
            help="processes; without it as many as it was launched with",
        ),
    ] = None,
    inline: Inline = False,
    address: Address = None,
    device: Device = None,
    cpus_per_worker: Cores = None,
    loader_threads: Loaders = None,
    max_restarts: Restarts = None,
    hang_minutes: Hang = None,
    verify: Verify = None,
    node_loss: NodeLoss = None,
    side_by_side: Annotated[
        str | None, count_option("--side-by-side", of="runs", metavar="N|auto", help=AT_A_TIME)
    ] = None,
    runs: Runs = RUNS,
    trust: Trust = [],  # noqa: B006
) -> None:
    """Resume a run at the exact sample of its newest valid checkpoint, or the runs of a suite.

    The options from --device to --side-by-side are saved with the run; without them it continues as
    it was launched.
    """
    _handle_signals()
    from pipeline.launch.cluster import OPERATIONAL_FIELDS, parse_workers
    from pipeline.report.selection import find_run

    options = {
        field: context.params[field] for field in OPERATIONAL_FIELDS if is_typed(context, field)
    }
    _resume(
        find_run(runs, run, suites=True),
        workers=None if workers is None else parse_workers(workers),
        inline=inline,
        address=address,
        options=options,
        trust=tuple(trust),
    )


def _resume(folder: Path, *, trust: tuple[str, ...], **how: Any) -> None:
    if is_suite(folder):
        from pipeline.launch.suite import resume_suite

        had_ended = len(done_entries(folder)) == len(suite_entries(folder))
        _end_suite(resume_suite(folder, **how, trust=trust), trust, had_ended=had_ended)
    else:
        from pipeline.launch.resume import resume_run

        _end_run(resume_run(folder, **how, trust=trust))


def _handle_signals() -> None:
    """Treat SIGUSR1 and SIGHUP as Ctrl-C before and between runs. Else they kill this process.

    During a run its driver handles them.
    """
    signal.signal(signal.SIGUSR1, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)


def _end_run(folder: Path) -> None:
    from pipeline.report.compare import print_comparison

    print_comparison(folder.parent, folders=[folder])
    _print_next(folder, run=folder)


def _end_suite(folder: Path, trust: tuple[str, ...], *, had_ended: bool = False) -> None:
    """Print the table or report of a suite, and write its page to its folder and to MLflow.

    `had_ended`: the suite was over before this command. An existing page is then kept, because
    `report` may have added to it.
    """
    from pipeline.report.page import publish, write
    from pipeline.report.suite import print_suite, read_study
    from pipeline.track.mlflow import REPORT

    reported = print_suite(folder, trust=trust)
    if not (had_ended and (folder / REPORT).exists()):
        try:
            result = read_study(folder.parent, [folder.name], trust=trust, reported=reported)
            page = write(result.study, result.place)
            print(f"page    {page}")
            publish(result, page)
        except (ValueError, OSError, TrackingError) as error:  # the runs themselves are complete
            print(
                f"{error}; its page is made anew, and put into MLflow, by:"
                f" {command('report', folder)}",
                file=sys.stderr,
            )
    finished = (run for run in runs_of(folder).values() if state_of(run) == "finished")
    _print_next(folder, run=next(finished, None))


def _print_next(folder: Path, *, run: Path | None) -> None:
    """Print the next commands, to be copied.

    `folder` is the folder of a run or a suite. `run` is the folder of that run, or of one run of
    the suite; None: all runs diverged.
    """
    commands = [command(verb, folder) for verb in ("compare", "report")]
    commands += [] if run is None else [command(verb, run) for verb in ("evaluate", "export")]
    print("next    " + "\n        ".join(commands))


def _comparison(made: list[Recipe | Suite], seeds: int, tune: str | None) -> Recipe | Suite:
    """One recipe or suite; a suite if there are several files, seeds or a search."""
    if len(made) == seeds == 1 and tune is None:
        return made[0]
    suite = over_seeds(
        joined([each if isinstance(each, Suite) else Suite((each,)) for each in made]), seeds
    )
    if tune is None:
        return suite
    from pipeline.report.suite import print_protocols

    return tuned(suite, *parse_search(tune), report=print_protocols)
