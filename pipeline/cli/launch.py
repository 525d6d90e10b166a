"""`spiketrain launch`, `resume` and `finetune`."""

import signal
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.cli.options import (
    RUNS,
    SIDE_BY_SIDE,
    SIZES,
    TRAIN,
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
    example,
    is_set_by_user,
    load_changed,
    number_option,
    parse_changes,
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
    submit_to_cluster,
)
from pipeline.cli.write import MaxUnreadable, run_writer
from pipeline.core.printing import new_console, say_next
from pipeline.core.run_folder import RunFolder
from pipeline.recipe.recipe import Recipe, read_json
from pipeline.recipe.recipe_files import find_recipe, refuse_unnamed, trust_of
from pipeline.recipe.search import join_suites, over_seeds, parse_search, with_tuning
from pipeline.recipe.suite import Suite, command, dashboard_command, is_suite, runs_of
from pipeline.track.mlflow_store import TrackingError
from pipeline.track.run_state import done_entries, state_of, suite_entries

if TYPE_CHECKING:
    from pipeline.launch.cluster import Cluster


RecipeFiles = Annotated[
    list[Path],
    typer.Argument(
        metavar="RECIPE",
        help="Python files that define recipe(), or packaged recipes such as fashion/sltt",
        callback=lambda paths: [find_recipe(path) for path in paths],
    ),
]
Sizes = Annotated[
    str,
    typer.Option(
        "--workers",
        metavar=SIZES,
        help="number of processes that train together; of several numbers, the largest that fits is"
        " used",
    ),
]
Seeds = Annotated[
    int,
    typer.Option("--seeds", min=1, help="number of runs of each recipe, with consecutive seeds"),
]
Tune = Annotated[
    str | None,
    typer.Option(
        "--tune",
        metavar="KEY=V,V,...",
        help="also train each rule with its best of 5 or more values of KEY, such as optimizer.lr",
    ),
]
SideBySide = Annotated[
    str | None,
    count_option(
        "--side-by-side",
        noun="runs",
        metavar="N|auto",
        help=(
            f"{SIDE_BY_SIDE}; default: auto, but 1 with --inline, with --address of an existing"
            " cluster or with several numbers of workers"
        ),
    ),
]
Name = Annotated[
    str | None,
    typer.Option(
        "--name",
        help="name of the run or suite; default: the name of the recipe or file, and the time",
    ),
]
OrResume = Annotated[
    bool,
    typer.Option("--or-resume", help="if a run or suite of this --name exists, resume it"),
]
Checkpoints = Annotated[
    str | None,
    typer.Option(
        "--checkpoints",
        metavar="DIR|URI",
        help=(
            "folder or URI (such as s3://bucket/prefix) for the checkpoints of each run, below the"
            " run's name; default: the run's folder"
        ),
    ),
]
Init = Annotated[
    str | None,
    typer.Option(
        "--init",
        metavar="RUN|FILE",
        help="start from the weights of a run or a file; short for --set init=...",
    ),
]
Weights = Annotated[
    str,
    typer.Argument(
        metavar="RUN|FILE",
        help="folder of a run, or its name under --runs, or a file of spiketrain export",
    ),
]
Pictures = Annotated[
    Path,
    typer.Argument(metavar="FOLDER", help="as for write folder, or with train.beton and val.beton"),
]
ModelOf = Annotated[
    Path | None,
    typer.Option(
        "--model", metavar="RECIPE", help="the network of published weights; not for runs, exports"
    ),
]
FfcvFolder = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="DIR", help="folder for the FFCV files; default: data/ and the name"
    ),
]
ValShare = Annotated[
    float | None,
    number_option("--val", help="share that evaluates if FOLDER has no val/; default: 0.1"),
]
TrainedBy = Annotated[
    Literal["sltt", "sltt-1", "ottt", "bptt"] | None,
    typer.Option("--rule", help="default: sltt, or bptt if sltt cannot train the network"),
]
Trains = Annotated[
    Literal["all", "head"], typer.Option("--trains", help="head: only the classifier")
]
LayerDecay = Annotated[
    float | None,
    number_option("--layer-decay", help="learning rate of a layer over that of the next"),
]
LearningRate = Annotated[float, number_option("--lr", help="highest learning rate, of AdamW")]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", min=1, help="default: 32, or all pictures if fewer")
]
PictureSize = Annotated[
    int | None, typer.Option("--size", min=1, help="pixels a side; default: as before")
]
commands = Commands()


# `_make_cluster` and `submit_to_cluster` read most options from `context.params`.
@commands.command(
    rich_help_panel=TRAIN,
    epilog=example("spiketrain launch fashion/sltt --workers 2 --set optimizer.lr=0.05"),
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
    init: Init = None,
    changes: Sets = [],  # noqa: B006  (typer reads the default, nothing changes it)
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
    """Train a recipe, or several, and print a table of the results.

    Several recipes are a suite. A suite may have its own report instead of the table, and gets a
    page, report.html in its folder.
    """
    _handle_signals()
    if name is not None:
        from pipeline.launch.prepare import folder_named

        folder_named(runs, name)  # raises if the name is not valid
    if init is not None:
        from pipeline.report.selection import find_run

        start = Path(init) if Path(init).exists() else find_run(runs, init)
        changes = [*changes, f"init={str(start)!r}"]
    workload = _combine([load_changed(recipe, changes, tiny) for recipe in recipes], seeds, tune)
    resources = _make_cluster(context.params, workload)
    refuse_unnamed(workload, recipes)
    trusted = trust_of(workload, recipes, trust)
    if submit_to_cluster(context, workload, sizes=resources.sizes, trust=trusted):
        return
    if or_resume and _resume_if_exists(context, workload, resources, trusted):
        return
    if isinstance(workload, Suite):
        from pipeline.launch.suite import launch_suite

        stem = "-and-".join(file.stem.replace("_", "-") for file in recipes[:2])
        stem += "-and-more" if len(recipes) > 2 else ""
        _end_suite(
            launch_suite(workload, resources, runs, stem=stem, name=name, trust=trusted),
            trusted,
        )
    else:
        from pipeline.launch.driver import launch_run

        _end_run(
            launch_run(
                workload, resources, runs, name=name, adopt_checkpoints=or_resume, trust=trusted
            )
        )


def _make_cluster(params: dict[str, Any], workload: Recipe | Suite) -> "Cluster":
    from pipeline.launch.cluster import Cluster, parse_workers

    options = {each.name: params[each.name] for each in fields(Cluster)}
    options["workers"] = parse_workers(params["workers"])
    if options["side_by_side"] is None:
        # An existing Ray cluster may have other users, and its CPUs may be logical cores. The user
        # therefore sets the number of runs that train there at the same time.
        defaults_to_auto = (
            isinstance(workload, Suite)
            and isinstance(options["workers"], int)
            and params["address"] in (None, "local")
            and not params["inline"]
        )
        options["side_by_side"] = "auto" if defaults_to_auto else 1
    if options["side_by_side"] != 1 and not isinstance(workload, Suite):
        raise ValueError(
            "launch: --side-by-side is for several runs; got"
            f" {params['side_by_side']} with {workload.name} alone"
        )
    return Cluster(**options)


def _resume_if_exists(
    context: typer.Context,
    workload: Recipe | Suite,
    resources: "Cluster",
    trust: tuple[str, ...],
) -> bool:
    runs, name = context.params["runs"], context.params["name"]
    if name is None:
        raise ValueError("launch: --or-resume needs the --name of a run or suite; got none")
    if not (runs / name).exists():
        return False
    from pipeline.launch.cluster import OPERATIONAL_FIELDS
    from pipeline.launch.resume import refuse_unless_launched_so

    refuse_unless_launched_so(runs / name, workload, resources, trust=trust)
    _resume(
        runs / name,
        workers=None if resources.inline else resources.workers,
        inline=resources.inline,
        address=context.params["address"] or (None if resources.inline else "local"),
        options={
            field: getattr(resources, field)
            for field in OPERATIONAL_FIELDS
            if is_set_by_user(context, field)
        },
        trust=trust,
    )
    return True


@commands.command(
    rich_help_panel=TRAIN,
    epilog=example("spiketrain finetune imagenet-sltt-20260105-120000 birds --workers 2"),
)
def finetune(
    weights: Weights,
    pictures: Pictures,
    model: ModelOf = None,
    data: FfcvFolder = None,
    val: ValShare = None,
    max_unreadable: MaxUnreadable = 0.0,
    rule: TrainedBy = None,
    trains: Trains = "all",
    layer_decay: LayerDecay = None,
    lr: LearningRate = 1e-3,
    epochs: Annotated[int, typer.Option("--epochs", min=1)] = 10,
    batch_size: BatchSize = None,
    size: PictureSize = None,
    workers: Sizes = "1",
    inline: Inline = False,
    device: Device = "auto",
    runs: Runs = RUNS,
    name: Name = None,
    changes: Sets = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Train a network further on your own pictures.

    The pictures are written to FFCV files first. The last lines show the accuracy and the most
    frequent mistakes, and where the report with the worst mistakes is.
    """
    _handle_signals()
    from pipeline.launch.cluster import Cluster, parse_workers
    from pipeline.launch.driver import launch_run
    from pipeline.launch.finetune import finetuning, read_start
    from pipeline.report.selection import find_run

    source = Path(weights) if Path(weights).is_file() else find_run(runs, weights)
    of = None if model is None else load_changed(find_recipe(model), [], tiny=False)
    if isinstance(of, Suite):
        raise ValueError(f"finetune: --model must be a file with one recipe; got {model}")
    start = read_start(source, of, trust=tuple(trust))
    folder = _in_ffcv_files(
        pictures, data or Path("data") / pictures.resolve().name, val, max_unreadable
    )
    recipe, reason = finetuning(
        start,
        folder.resolve(),
        rule=rule,
        trains=trains,
        layer_decay=layer_decay,
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        size=size,
        name=f"finetune-{folder.resolve().name}",
    )
    if reason:
        print(reason, file=sys.stderr)
    cluster = Cluster(workers=parse_workers(workers), inline=inline, device=device or "auto")
    recipe = recipe.override(parse_changes(changes))
    run = launch_run(recipe, cluster, runs, name=name, trust=tuple(trust))
    _end_run(run)


def _in_ffcv_files(pictures: Path, folder: Path, val: float | None, max_unreadable: float) -> Path:
    """The folder of the FFCV files, which are written unless they exist."""
    from pipeline.data.write.images import write_folder

    if (pictures / "train.beton").exists():
        return pictures
    if val is None and not (pictures / "train").is_dir():
        val = 0.1
    run_writer(
        pictures.name,
        partial(
            write_folder,
            pictures,
            folder,
            val=val,
            max_unreadable=max_unreadable,
            existing="keep",
        ),
    )
    return folder


def _end_finetuning(run: Path) -> None:
    """Print how often the most frequent wrong answers were given, and write the page."""
    from pipeline.launch.finetune import write_mistakes
    from pipeline.report.page import write
    from pipeline.report.suite import read_study
    from pipeline.track.mlflow import REPORT

    found = write_mistakes(run)
    names, confusion = found["class_names"], found["confusion"]
    wrong = [
        (count, target, answer)
        for target, counts in enumerate(confusion)
        for answer, count in enumerate(counts)
        if count and target != answer
    ]
    for count, target, answer in sorted(wrong, reverse=True)[:5]:
        print(f"mistook {names[target]} for {names[answer]}: {count} of {sum(confusion[target])}")
    print(f"page    {write(read_study(run.parent, [run.name]).study, run / REPORT)}")


@commands.command(
    rich_help_panel=TRAIN, epilog=example("spiketrain resume fashion-sltt-20260105-120000")
)
def resume(
    context: typer.Context,
    run: RunOrSuite,
    workers: Annotated[
        str | None,
        typer.Option(
            "--workers",
            metavar=SIZES,
            help="processes that train together; default: as many as at the launch",
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
        str | None, count_option("--side-by-side", noun="runs", metavar="N|auto", help=SIDE_BY_SIDE)
    ] = None,
    runs: Runs = RUNS,
    trust: Trust = [],  # noqa: B006
) -> None:
    """Continue a run or a suite from its newest checkpoint.

    A run continues from its newest valid checkpoint. The values of the options from --device to
    --side-by-side are saved with the run. An option that is not given keeps its saved value.
    """
    _handle_signals()
    from pipeline.launch.cluster import OPERATIONAL_FIELDS, parse_workers
    from pipeline.report.selection import find_run

    _resume(
        find_run(runs, run, suites=True),
        workers=None if workers is None else parse_workers(workers),
        inline=inline,
        address=address,
        options={
            field: context.params[field]
            for field in OPERATIONAL_FIELDS
            if is_set_by_user(context, field)
        },
        trust=tuple(trust),
    )


def _resume(folder: Path, *, trust: tuple[str, ...], **arguments: Any) -> None:
    if is_suite(folder):
        from pipeline.launch.suite import resume_suite

        had_finished = len(done_entries(folder)) == len(suite_entries(folder))
        _end_suite(resume_suite(folder, **arguments, trust=trust), trust, had_finished=had_finished)
    else:
        from pipeline.launch.resume import resume_run

        _end_run(resume_run(folder, **arguments, trust=trust))


def _handle_signals() -> None:
    """Treat SIGUSR1 and SIGHUP as Ctrl-C before and between runs. By default they end the process.

    During a run, the run's driver handles them.
    """
    signal.signal(signal.SIGUSR1, signal.default_int_handler)
    # nohup ignores SIGHUP; leave that as it is
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.default_int_handler)


def _end_run(folder: Path) -> None:
    from pipeline.launch.finetune import FAMILY
    from pipeline.report.compare import print_comparison

    print_comparison(folder.parent, folders=[folder])
    if read_json(RunFolder(folder).recipe)["recipe"].get("family") == FAMILY:
        _end_finetuning(folder)
    _say_next([command("report", folder)], run=folder)


def _end_suite(folder: Path, trust: tuple[str, ...], *, had_finished: bool = False) -> None:
    """Print the table or report of a suite, and write its page to its folder and to MLflow.

    `had_finished`: the suite was over before this command. An existing page is then kept, because
    `report` may have written a fuller one.
    """
    from pipeline.report.page import publish, write
    from pipeline.report.suite import print_suite, read_study
    from pipeline.track.mlflow import REPORT

    report_value = print_suite(folder, trust=trust)
    if not (had_finished and (folder / REPORT).exists()):
        try:
            result = read_study(folder.parent, [folder.name], trust=trust, reported=report_value)
            page = write(result.study, result.place)
            print(f"page    {page}")
            publish(result, page)
        except (ValueError, OSError, TrackingError) as error:  # the runs themselves are complete
            print(
                f"{error}; write the page again, and log it to MLflow, with:"
                f" {command('report', folder)}",
                file=sys.stderr,
            )
    finished = (run for run in runs_of(folder).values() if state_of(run) == "finished")
    _say_next([command("compare", folder)], run=next(finished, None))


def _say_next(commands: list[str], *, run: Path | None) -> None:
    """Print these commands, and those for a run that has finished; None: none has."""
    if run is not None:
        commands = [*commands, dashboard_command(run.parent), command("export", run)]
        job = RunFolder(run).job
        if job.exists() and read_json(job).get("picture_options") is not None:
            commands.append(f"{command('predict', run)} PICTURE")
    say_next(new_console(), commands)


def _combine(members: list[Recipe | Suite], seeds: int, tune: str | None) -> Recipe | Suite:
    """The recipe or suite to launch: a suite if there are several files, seeds or a search."""
    if len(members) == 1 and seeds == 1 and tune is None:
        return members[0]
    suite = over_seeds(
        join_suites([each if isinstance(each, Suite) else Suite((each,)) for each in members]),
        seeds,
    )
    if tune is None:
        return suite
    from pipeline.report.suite import print_protocols

    return with_tuning(suite, *parse_search(tune), report=print_protocols)
