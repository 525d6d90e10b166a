"""`spiketrain launch` and `resume`: what trains. As in `__main__`, nothing heavy is imported before
one of them runs.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.cli.options import (
    RUNS,
    Address,
    Cores,
    CoresOrAsBefore,
    Device,
    DeviceOrAsBefore,
    Hang,
    HangOrAsBefore,
    Inline,
    Loaders,
    LoadersOrAsBefore,
    NodeLoss,
    NodeLossOrAsBefore,
    RecipeFiles,
    Restarts,
    RestartsOrAsBefore,
    RunOrSuite,
    Runs,
    Sets,
    SideBySide,
    SideBySideOrAsBefore,
    Sizes,
    SizesOrAsBefore,
    Tiny,
    Trust,
    Verify,
    VerifyOrAsBefore,
    count_or_auto,
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

if TYPE_CHECKING:
    from pipeline.recipe.recipe import Recipe
    from pipeline.recipe.suite import Suite
    from pipeline.report.suite import Reported

Seeds = Annotated[
    int,
    typer.Option(
        "--seeds", min=1, help="train each recipe so often, with seeds that follow its own"
    ),
]
Tune = Annotated[
    str | None,
    typer.Option(
        "--tune",
        metavar="KEY=V,V,...",
        help="beside it, each rule with the best of 5 values or more, such as of optimizer.lr",
    ),
]
Name = Annotated[
    str | None,
    typer.Option(
        "--name",
        help="the run's name, or the suite's; without it the recipe's, or the file's, and the time",
    ),
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
OrResume = Annotated[
    bool,
    typer.Option(
        "--or-resume", help="go on with the run or suite of this --name where it has begun"
    ),
]


def add_launch_commands(app: typer.Typer) -> None:
    app.command(
        epilog=(
            "Example: spiketrain launch recipes/fashion/sltt.py --workers 2 --set optimizer.lr=0.05"
        )
    )(launch)
    app.command(epilog="Example: spiketrain resume fashion-sltt-20260105-120000")(resume)


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
    set_: Sets = [],  # noqa: B006  (typer reads the default, nobody changes it)
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
    """Train a recipe, or each recipe of a comparison, and end in a table or the comparison's own
    report.
    """
    _heed_signals()
    if name is not None:
        from pipeline.launch.folder import named

        named(runs, name)
    made = _comparison([made_of(recipe, set_, tiny) for recipe in recipes], seeds, tune)
    from pipeline.launch.cluster import OPERATIONAL, Cluster, parse_workers
    from pipeline.recipe.files import refuse_unnamed, trust_of
    from pipeline.recipe.suite import Suite

    sizes = parse_workers(workers)
    here = Cluster(
        workers=sizes,
        inline=inline,
        address=address,
        device=device,
        cpus_per_worker=count_or_auto(
            cpus_per_worker, option="launch: --cpus-per-worker", of="cores"
        ),
        loader_threads=count_or_auto(
            loader_threads, option="launch: --loader-threads", of="threads"
        ),
        max_restarts=max_restarts,
        hang_minutes=hang_minutes,
        verify=verify,
        checkpoints=checkpoints,
        node_loss=node_loss,
        side_by_side=_at_a_time(
            side_by_side, made, sizes, is_here=address in (None, "local") and not inline
        ),
    )
    if here.side_by_side != 1 and not isinstance(made, Suite):
        raise ValueError(
            f"launch: --side-by-side is for several runs; got {side_by_side} with {made.name} alone"
        )
    refuse_unnamed(made, recipes)
    trusted = trust_of(made, recipes, trust)
    if hand_over(
        context, made, workers=here.workers, trust=trusted
    ):  # which reads cluster to partition from there
        return
    if or_resume:
        if name is None:
            raise ValueError("launch: --or-resume goes on with what has this --name; got none")
        if (runs / name).exists():
            from pipeline.launch.resume_options import refuse_unless_launched_so

            refuse_unless_launched_so(runs / name, made, here, trust=trusted)
            where: dict[str, Any] = {
                "workers": None if inline else here.workers,
                "inline": inline,
                "address": address or (None if inline else "local"),
            }
            options = {
                field: getattr(here, field) for field in OPERATIONAL if is_typed(context, field)
            }
            _go_on(runs / name, **where, options=options, trust=trusted)
            return
    if isinstance(made, Suite):
        from pipeline.launch.suite import launch_suite

        stem = "-and-".join(recipe.stem.replace("_", "-") for recipe in recipes[:2]) + (
            "-and-more" if len(recipes) > 2 else ""
        )
        _end_suite(launch_suite(made, here, runs, stem=stem, name=name, trust=trusted), trusted)
    else:
        from pipeline.launch.start import launch_run

        _end_run(launch_run(made, here, runs, name=name, adopts=or_resume, trust=trusted))


def resume(
    context: typer.Context,
    run: RunOrSuite,
    workers: SizesOrAsBefore = None,
    inline: Inline = False,
    address: Address = None,
    device: DeviceOrAsBefore = None,
    cpus_per_worker: CoresOrAsBefore = None,
    loader_threads: LoadersOrAsBefore = None,
    max_restarts: RestartsOrAsBefore = None,
    hang_minutes: HangOrAsBefore = None,
    verify: VerifyOrAsBefore = None,
    node_loss: NodeLossOrAsBefore = None,
    side_by_side: SideBySideOrAsBefore = None,
    runs: Runs = RUNS,
    trust: Trust = [],  # noqa: B006
) -> None:
    """Go on with a run at the exact sample where its newest whole checkpoint stands; with a suite,
    run by run.

    --device to --side-by-side hold from then on; without them it goes on as it was launched.
    """
    _heed_signals()
    from pipeline.launch.cluster import OPERATIONAL, option, parse_workers
    from pipeline.report.runs import find_run_or_suite

    asked = None if workers is None else parse_workers(workers)
    options = {
        field: context.params[field] for field in OPERATIONAL if is_typed(context, field)
    }  # device to side_by_side
    for field, of in (
        ("cpus_per_worker", "cores"),
        ("loader_threads", "threads"),
        ("side_by_side", "runs"),
    ):
        if options.get(field) is not None:
            options[field] = count_or_auto(options[field], option=f"resume: {option(field)}", of=of)
    folder = find_run_or_suite(runs, run)
    _go_on(
        folder, workers=asked, inline=inline, address=address, options=options, trust=tuple(trust)
    )


def _go_on(
    folder: Path,
    *,
    workers: int | tuple[int, ...] | None,
    inline: bool,
    address: str | None,
    options: dict[str, Any],
    trust: tuple[str, ...],
) -> None:
    from pipeline.recipe.suite import is_suite

    how: dict[str, Any] = {
        "workers": workers,
        "inline": inline,
        "address": address,
        "options": options,
    }
    if is_suite(folder):
        from pipeline.launch.suite import resume_suite
        from pipeline.recipe.suite import runs_of
        from pipeline.track.trials import over_in

        had_ended = len(over_in(folder)) == len(runs_of(folder))
        _end_suite(resume_suite(folder, **how, trust=trust), trust, had_ended=had_ended)
    else:
        from pipeline.launch.start import resume_run

        _end_run(resume_run(folder, **how, trust=trust))


def _heed_signals() -> None:
    """Before and between runs SIGUSR1 and SIGHUP are Ctrl-C: left alone they kill this process.
    During a run they save it.
    """
    signal.signal(signal.SIGUSR1, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)


def _end_run(folder: Path | None) -> None:
    """The table of what was trained; somebody who stopped the training gets the shell's code for
    that.
    """
    if folder is None:
        sys.exit(130)
    from pipeline.report.compare import print_studies

    print_studies(folder.parent, [folder])
    _print_next(folder, run=folder)


def _end_suite(folder: Path | None, trust: tuple[str, ...], *, had_ended: bool = False) -> None:
    """Its table or report; and its page, in its folder and in MLflow, which since it `had_ended`
    may have been made richer.
    """
    if folder is None:
        sys.exit(130)
    from pipeline.recipe.suite import runs_of
    from pipeline.report.suite import print_suite
    from pipeline.track.publish import REPORT
    from pipeline.track.state import state_of

    reported = print_suite(folder, trust=trust)
    if not (had_ended and (folder / REPORT).exists()):
        _renew_page(folder, trust, reported)
    _print_next(
        folder,
        run=next((run for run in runs_of(folder).values() if state_of(run) == "finished"), None),
    )


def _renew_page(folder: Path, trust: tuple[str, ...], reported: Reported | None) -> None:
    from pipeline.recipe.command_line import command
    from pipeline.report.page import write
    from pipeline.report.publish import publish
    from pipeline.report.read_study import read_study
    from pipeline.track.connect import TrackingError

    try:
        found = read_study(folder.parent, [folder.name], trust=trust, reported=reported)
        page = write(found.study, found.place)
        print(f"page    {page}")
        publish(found, page)
    except (
        ValueError,
        OSError,
        TrackingError,
    ) as error:  # the runs are there, and whoever waits for them has what it waited for
        again = command("report", folder)
        print(f"{error}; its page is made anew, and put into MLflow, by: {again}", file=sys.stderr)


def _print_next(folder: Path, *, run: Path | None) -> None:
    """Commands to go on with, to be copied: `folder` is of a run or a suite, `run` it or one of its
    runs (None: all diverged).
    """
    from pipeline.recipe.command_line import command

    commands = [command(verb, folder) for verb in ("compare", "report")]
    commands += [] if run is None else [command(verb, run) for verb in ("evaluate", "export")]
    print("next    " + "\n        ".join(commands))


def _at_a_time(
    asked: str | None, made: Recipe | Suite, sizes: int | tuple[int, ...], *, is_here: bool
) -> int | Literal["auto"]:
    """Unasked, as many runs of a suite as there is room for `is_here`, on a cluster of our own; one
    where they change their size.

    A cluster of the user's has other users, and what it calls a CPU may be half a core: there they
    say how many."""
    from pipeline.recipe.suite import Suite

    if asked is not None:
        return count_or_auto(asked, option="launch: --side-by-side", of="runs")
    return "auto" if isinstance(made, Suite) and is_here and isinstance(sizes, int) else 1


def _comparison(made: list[Recipe | Suite], seeds: int, tune: str | None) -> Recipe | Suite:
    """What several files, seeds or a search make of recipes: a suite of them."""
    from pipeline.recipe.suite import Suite

    if len(made) == seeds == 1 and tune is None:
        return made[0]
    from pipeline.recipe.search import joined, over_seeds, parse_search, tuned

    suite = over_seeds(
        joined([each if isinstance(each, Suite) else Suite((each,)) for each in made]), seeds
    )
    if tune is None:
        return suite
    from pipeline.report.protocols import print_protocols

    return tuned(suite, *parse_search(tune), report=print_protocols)
