"""The command line: parses, loads a recipe, calls launch, report or data. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from pipeline import track_command
from pipeline.report_command import add_report_commands
from pipeline.write_command import write_app

if TYPE_CHECKING:
    from pipeline.recipe import Recipe
    from pipeline.suite import Suite

app = typer.Typer(
    name="spiketrain",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train spiking neural networks by the rule a recipe names, and compare what it cost with BPTT.",
    epilog="Example: spiketrain launch recipes/compare/fashion_demo.py --workers 2",
)
app.add_typer(write_app, name="write")

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="a Python file that defines recipe()")]
RecipeFiles = Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Python files that define recipe()")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="train each recipe so often, with seeds that follow its own")]
Tune = Annotated[
    str | None,
    typer.Option(
        "--tune", metavar="KEY=V,V,...", help="beside it, each rule with the best of 5 values or more, such as of optimizer.lr"
    ),
]
SideBySide = Annotated[
    str, typer.Option("--side-by-side", metavar="N|auto", help="runs at a time, each on cores and cards of its own")
]
RunOrSuite = Annotated[str, typer.Argument(metavar="RUN|SUITE", help="its folder, or its name under --runs")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="a run's folder, or its name under --runs")]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="where runs live")]
Sets = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="change the recipe, for example optimizer.lr=0.05; repeatable")
]
Trust = Annotated[
    list[str], typer.Option("--trust", metavar="PACKAGE", help="a package of your own that the recipe imports from; repeatable")
]
Tiny = Annotated[bool, typer.Option("--tiny", help="shrink the recipe to seconds on a CPU")]
Workers = Annotated[int, typer.Option("--workers", min=1, help="processes that train together")]
Inline = Annotated[bool, typer.Option("--inline", help="one worker in this process, without Ray")]
Address = Annotated[str | None, typer.Option("--address", help="of a Ray cluster: auto, host:6379; without it one starts here")]
Device = Annotated[Literal["auto", "cpu", "gpu"], typer.Option("--device", help="auto takes GPUs where there are any")]
Cpus = Annotated[int, typer.Option("--cpus-per-worker", min=1, help="cores reserved for a worker, and its torch threads")]
Loaders = Annotated[int, typer.Option("--loader-threads", min=1, help="threads that read data in each worker")]
Restarts = Annotated[int, typer.Option("--max-restarts", min=0, help="how often dead workers are started again")]
Name = Annotated[
    str | None,
    typer.Option("--name", help="the run's name, or the suite's; without it the recipe's, or the file's, and the time"),
]

RUNS = Path("runs")


usage_error: Any = typer.BadParameter.__mro__[1]  # typer 0.29 brings its own click, older ones do not


def main() -> None:
    """Run the command line; what a user can mend ends in one line and exit code 2."""
    try:
        code = app(prog_name="spiketrain", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except usage_error as error:
        where = error.ctx.command_path if error.ctx is not None else "spiketrain"
        print(f"{error.format_message()} (see {where} --help)", file=sys.stderr)
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except ValueError as error:
        _refuse(error, 2)
    except (RuntimeError, OSError) as error:
        if type(error).__module__.startswith("pipeline.") or isinstance(error, OSError):
            _refuse(error, 1)
        raise


def _refuse(error: Exception, code: int) -> NoReturn:
    print(" ".join(str(error).split()), file=sys.stderr)
    sys.exit(code)


@app.command(epilog="Example: spiketrain launch recipes/fashion/sltt.py --workers 2 --set optimizer.lr=0.05")
def launch(
    recipes: RecipeFiles,
    workers: Workers = 1,
    inline: Inline = False,
    address: Address = None,
    device: Device = "auto",
    cpus_per_worker: Cpus = 1,
    loader_threads: Loaders = 1,
    max_restarts: Restarts = 3,
    seeds: Seeds = 1,
    tune: Tune = None,
    side_by_side: SideBySide = "1",
    runs: Runs = RUNS,
    name: Name = None,
    set_: Sets = [],  # noqa: B006  (typer reads the default, nobody changes it)
    trust: Trust = [],  # noqa: B006
    tiny: Tiny = False,
) -> None:
    """Train a recipe, or each recipe of a comparison, and end in a table or the comparison's own report."""
    made = _comparison([_made(recipe, set_, tiny) for recipe in recipes], seeds, tune)
    from pipeline.launch.cluster import Cluster
    from pipeline.recipe_file import own_package
    from pipeline.suite import Suite

    cluster = Cluster(
        workers=workers,
        inline=inline,
        address=address,
        device=device,
        cpus_per_worker=cpus_per_worker,
        loader_threads=loader_threads,
        max_restarts=max_restarts,
        side_by_side=_count_or_auto(side_by_side),
    )
    trusted = (*trust, *(package for recipe in recipes for package in own_package(recipe, made)))
    if isinstance(made, Suite):
        from pipeline.launch.suite import launch_suite

        stem = "-and-".join(recipe.stem.replace("_", "-") for recipe in recipes[:2]) + ("-and-more" if len(recipes) > 2 else "")
        _end_suite(launch_suite(made, cluster, runs, stem=stem, name=name, trust=trusted), trusted)
    else:
        from pipeline.launch.start import launch_run

        if cluster.side_by_side != 1:
            raise ValueError(f"launch: --side-by-side is for several runs; got {side_by_side} with {made.name} alone")
        _end_run(launch_run(made, cluster, runs, name=name, trust=trusted), runs)


@app.command(epilog="Example: spiketrain resume fashion-sltt-20260105-120000")
def resume(
    run: RunOrSuite,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="processes; without it as many as before")] = None,
    inline: Inline = False,
    address: Address = None,
    runs: Runs = RUNS,
    trust: Trust = [],  # noqa: B006
) -> None:
    """Go on with a run at the exact sample where its newest whole checkpoint stands; with a suite, run by run."""
    from pipeline.report.runs import find_run_or_suite
    from pipeline.suite import is_suite

    folder, trusted = find_run_or_suite(runs, run), tuple(trust)
    if is_suite(folder):
        from pipeline.launch.suite import resume_suite

        _end_suite(resume_suite(folder, workers=workers, inline=inline, address=address, trust=trusted), trusted)
    else:
        from pipeline.launch.start import resume_run

        _end_run(resume_run(folder, runs, workers=workers, inline=inline, address=address, trust=trusted), runs)


@app.command(
    epilog="Example: spiketrain evaluate fashion-sltt-20260105-120000 --which best; "
    "spiketrain evaluate recipes/imagenet/qkformer_10_384_bptt.py --weights published.pth"
)
def evaluate(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN|RECIPE", help="a run's folder, or its name under --runs; with --weights also a recipe file"),
    ],
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights", metavar="FILE", help="what export wrote, .safetensors, .pt or .pth; QKFormer's also as published"
        ),
    ] = None,
    which: Annotated[Literal["last", "best"] | None, typer.Option("--which", help="checkpoint; without it the last")] = None,
    steps: Annotated[int | None, typer.Option("--time-steps", min=1, help="evaluate at another number of time steps")] = None,
    runs: Runs = RUNS,
    set_: Sets = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Evaluate a network, a run's or a recipe's, on its whole evaluation set, in this process."""
    if run.endswith(".py"):
        made = _made(Path(run), set_, tiny=False)
        from pipeline.launch.start import evaluate_recipe

        evaluate_recipe(made, which=which, weights=weights, time_steps=steps)
        return
    from pipeline.launch.start import evaluate_run
    from pipeline.report.runs import find_run

    if set_:
        raise ValueError(f"evaluate: --set changes a recipe, and a run keeps its own; got {run} with --set {set_[0]}")
    evaluate_run(find_run(runs, run), which=which, weights=weights, time_steps=steps, trust=tuple(trust))


@app.command(epilog="Example: spiketrain export fashion-sltt-20260105-120000 --packed")
def export(
    run: RunName,
    packed: Annotated[bool, typer.Option("--packed", help="1-bit weights as bits, 8 to a byte")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="a new .safetensors file; without it one in the run's folder")
    ] = None,
    which: Annotated[Literal["last", "best"], typer.Option("--which", help="checkpoint")] = "last",
    runs: Runs = RUNS,
    trust: Trust = [],  # noqa: B006
) -> None:
    """Write a trained network as one file, from which pipeline.load makes it again; print its size."""
    from pipeline.export import export_run
    from pipeline.report.runs import find_run

    layout = "packed" if packed else "plain"
    print(export_run(find_run(runs, run), out, layout=layout, which=which, trust=tuple(trust)))


@app.command(epilog="Example: spiketrain carryover fashion-sltt-20260105-120000 --steps 1,2,4,8")
def carryover(
    run: RunName,
    steps: Annotated[
        str | None, typer.Option("--steps", metavar="T,...", help="without it 1,2,4,8, and for recordings their own length")
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=2, help="samples at a time; without it as in training. Memory grows with T")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option("--by", metavar="GROUP", help="standard errors over groups of samples, such as object of a set of stamps"),
    ] = None,
    which: Annotated[Literal["last", "best"], typer.Option("--which", help="checkpoint")] = "last",
    runs: Runs = RUNS,
    trust: Trust = [],  # noqa: B006
) -> None:
    """Is what membranes carry over noise? Single steps and their ensemble with the real carry-over, none, another's, or noise."""
    from pipeline.launch.carryover import carryover_of_run
    from pipeline.report.carryover import print_carryover
    from pipeline.report.runs import find_run

    folder = find_run(runs, run)
    found = carryover_of_run(folder, which=which, steps=steps, micro_batch=batch, by=by, trust=tuple(trust))
    print_carryover(found, f"{folder.name} ({which})", by=by)


add_report_commands(app)


@app.command(epilog="Example: spiketrain show recipes/fashion/sltt.py --workers 2")
def show(
    recipe: RecipeFile,
    workers: Workers = 1,
    set_: Sets = [],  # noqa: B006
    tiny: Tiny = False,
) -> None:
    """Print the resolved recipe, its size, its study and the DeepSpeed settings; needs no data."""
    made = _made(recipe, set_, tiny)
    from pipeline.report.show import show_recipe

    show_recipe(made, workers)


@app.command(epilog="Example: spiketrain probe recipes/fashion/sltt.py")
def probe(
    recipe: RecipeFile,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="samples; without it what one worker holds at a time in training")
    ] = None,
    cpus_per_worker: Cpus = 1,
    format_: Annotated[Literal["table", "json"], typer.Option("--format")] = "table",
    set_: Sets = [],  # noqa: B006
    tiny: Tiny = False,
) -> None:
    """Before any training: what each rule costs on this network and data, and how near its gradient is to BPTT's."""
    made = _one(recipe, set_, tiny, who="probe")
    from pipeline.probe import probe as probe_recipe
    from pipeline.report.probe import print_probe

    print_probe(probe_recipe(made, batch_size=batch, threads=cpus_per_worker), as_json=format_ == "json")


@app.command(epilog="Example: spiketrain sweep recipes/fashion/sltt.py --steps 1,2,4,8,16 --batch auto")
def sweep(
    recipe: RecipeFile,
    steps: Annotated[str, typer.Option("--steps", metavar="T,...", help="numbers of time steps")] = "1,2,4,8,16",
    batch: Annotated[
        str | None,
        typer.Option("--batch", metavar="N|auto", help="samples; auto: as in training, and the largest that fits beside it"),
    ] = None,
    memory: Annotated[
        float | None, typer.Option("--memory", metavar="GB", help="that the largest batch may take; without it what is free")
    ] = None,
    cpus_per_worker: Cpus = 1,
    format_: Annotated[Literal["table", "json"], typer.Option("--format")] = "table",
    set_: Sets = [],  # noqa: B006
    tiny: Tiny = False,
) -> None:
    """Before any training: memory and time of each rule against the number of time steps."""
    if batch not in (None, "auto") and not (batch.isdecimal() and int(batch) > 0):
        raise ValueError(f"sweep: --batch must be a number of samples or auto; got {batch}")
    if memory is not None and (batch != "auto" or not 1e-6 <= memory <= 1e6):
        raise ValueError(
            f"sweep: --memory is a limit in GB, from 1e-6 to 1e6, for --batch auto; got {memory:g} with --batch {batch}"
        )
    from pipeline.counts import listed_time_steps

    times = listed_time_steps("sweep", steps)
    made = _one(recipe, set_, tiny, who="sweep")
    from pipeline.report.sweep import print_sweep
    from pipeline.sweep import sweep as sweep_recipe

    limit = None if batch != "auto" else "free" if memory is None else int(memory * 1e9)
    size = int(batch) if batch not in (None, "auto") else None
    about = {"batch_size": size, "memory_bytes": limit, "threads": cpus_per_worker}
    print_sweep(sweep_recipe(made, steps=times, **about), as_json=format_ == "json")


@app.command(
    epilog="Example: spiketrain plan recipes/imagenet/qkformer_10_384_sltt_k1.py --workers 64 --device h100 --batch-of noise"
)
def plan(
    recipe: RecipeFile,
    workers: Workers = 1,
    device: Annotated[
        str, typer.Option("--device", metavar="here|CARD", help="a card of the table, or machines like this")
    ] = "here",
    per_node: Annotated[int | None, typer.Option("--per-node", min=1, help="cards in a node; without it 8")] = None,
    node_gbps: Annotated[
        float | None, typer.Option("--node-gbps", min=0.001, help="from node to node, in Gb/s; without it 400")
    ] = None,
    cpus_per_worker: Cpus = 1,
    price: Annotated[float | None, typer.Option("--price", min=0, help="of an hour of one worker, in your currency")] = None,
    batch_of: Annotated[
        Literal["data", "noise"], typer.Option("--batch-of", help="noise: where the data is not here; name --samples then")
    ] = "data",
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="of an epoch; without it the data's")] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="RUN", help="that was launched on this machine: how far off the plan is")
    ] = None,
    runs: Runs = RUNS,
    format_: Annotated[Literal["table", "json"], typer.Option("--format")] = "table",
    set_: Sets = [],  # noqa: B006
    tiny: Tiny = False,
) -> None:
    """Before anything is launched: memory, speed, hours and energy of each rule on machines that are not here. A model."""
    made = _one(recipe, set_, tiny, who="plan")
    from pipeline.devices import DEVICES
    from pipeline.plan import Cluster
    from pipeline.plan import plan as plan_recipe
    from pipeline.report.plan import print_plan

    if device != "here" and device not in DEVICES:
        raise ValueError(f"plan: --device must be here, {', '.join(DEVICES)}; got {device}")
    if batch_of == "noise" and (samples is None or device == "here"):
        raise ValueError("plan: --batch-of noise needs --samples, and a card: what it takes here depends on the data")
    if device == "here" and (per_node, node_gbps) != (None, None):
        raise ValueError("plan: --per-node and --node-gbps are of cards in nodes; what links machines like this one is measured")
    cluster = Cluster(
        workers=workers,
        device=DEVICES.get(device),
        per_node=per_node or 8,
        node_link=(node_gbps or 400.0) * 1e9 / 8,
        price=price,
        threads=cpus_per_worker,
    )
    if against is None:
        print_plan(plan_recipe(made, cluster, samples=samples, source=batch_of), as_json=format_ == "json")
        return
    from pipeline.report.planned import errors, refuse_unless_comparable
    from pipeline.report.runs import find_run

    folder = find_run(runs, against)
    refuse_unless_comparable(made, cluster, folder)
    found = plan_recipe(made, cluster, samples=samples, source=batch_of)
    print_plan(found, against=errors(found, folder), as_json=format_ == "json")


@app.command("runs", epilog="Example: spiketrain runs --runs /scratch/runs")
def runs_(runs: Runs = RUNS) -> None:
    """List suites and runs with their state and the command that resumes each."""
    from pipeline.report.runs import print_runs

    print_runs(runs)


@app.command(epilog="Example: spiketrain verify data/fashion")
def verify(path: Annotated[Path, typer.Argument(metavar="FILE", help="a .beton file, or a folder of them")]) -> None:
    """Check every byte of FFCV files against their manifests."""
    from pipeline.data.write import verify as verify_files

    for manifest in verify_files(path):
        counts = f"{manifest.samples} samples, {len(manifest.classes)} classes"
        print(f"{manifest.file}: {counts}, content {manifest.content[:16]}: whole")


app.command(epilog="Example: spiketrain sync fashion-sltt-20260105-120000")(track_command.sync)
app.command(epilog="Example: spiketrain register fashion-sltt-20260105-120000 --as fashion --which best")(track_command.register)


def _end_run(folder: Path | None, runs: Path) -> None:
    """The table of what was trained; somebody who stopped the training gets the shell's code for that."""
    if folder is None:
        sys.exit(130)
    from pipeline.report.compare import print_studies

    print_studies(runs, [folder])


def _end_suite(folder: Path | None, trust: tuple[str, ...]) -> None:
    if folder is None:
        sys.exit(130)
    from pipeline.report.suite import print_suite

    print_suite(folder, trust=trust)


def _one(path: Path, changes: list[str], tiny: bool, *, who: str) -> Recipe:
    """As `_made`, of a file that holds one."""
    from pipeline.recipe import Recipe

    made = _made(path, changes, tiny)
    if not isinstance(made, Recipe):
        names = ", ".join(each.name for each in made.recipes)
        raise ValueError(f"{who}: the file must hold one recipe; got a suite of {len(made.recipes)}: {names}")
    return made


def _comparison(made: list[Recipe | Suite], seeds: int, tune: str | None) -> Recipe | Suite:
    """What several files, seeds or a search make of recipes: a suite of them."""
    from pipeline.suite import Suite

    if len(made) == seeds == 1 and tune is None:
        return made[0]
    from pipeline.protocol import joined, over_seeds, parse_search, tuned

    suite = over_seeds(joined([each if isinstance(each, Suite) else Suite((each,)) for each in made]), seeds)
    return suite if tune is None else tuned(suite, *parse_search(tune))


def _count_or_auto(text: str) -> int | Literal["auto"]:
    if text != "auto" and not (text.isdecimal() and int(text) > 0):
        raise ValueError(f"launch: --side-by-side must be a number of runs or auto; got {text}")
    return "auto" if text == "auto" else int(text)


def _made(path: Path, changes: list[str], tiny: bool) -> Recipe | Suite:
    from pipeline.recipe_file import load_recipe, parse_changes

    made = load_recipe(path).override(parse_changes(changes))
    return made.tiny() if tiny else made


if __name__ == "__main__":
    main()
