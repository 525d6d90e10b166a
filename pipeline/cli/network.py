"""`spiketrain evaluate`, `predict`, `export`, `check` and `models`: commands about networks."""

import importlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.cli.options import (
    MODELS,
    RUNS,
    Commands,
    Format,
    RunName,
    Runs,
    Sets,
    Trust,
    example,
    is_set_by_user,
    load_changed,
)
from pipeline.core.checks import require
from pipeline.core.run_folder import ExportFormat
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.recipe_files import find_recipe, trust_of

if TYPE_CHECKING:
    from torch import Tensor, nn

commands = Commands()
SAMPLES = 4  # of a recipe's data


@commands.command(
    rich_help_panel=MODELS,
    epilog=example(
        "spiketrain evaluate fashion-sltt-20260105-120000 --which best",
        "spiketrain evaluate recipes/imagenet/qkformer_10_384_bptt.py --weights q.pth",
    ),
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
                " torch.save), or published weights of its family"
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
    """Measure the accuracy of a run on its whole evaluation set.

    With --weights also of a recipe. The evaluation runs in this process.
    """
    from pipeline.launch.evaluate import evaluate_recipe, evaluate_run

    chosen: Any = {"which": which, "weights": weights, "time_steps": steps, "trust": tuple(trust)}
    run = str(find_recipe(Path(run)))
    if run.endswith(".py"):
        require(
            not is_set_by_user(context, "runs"),
            f"evaluate: --runs has no effect with a recipe file; got {run} with --runs {runs}",
        )
        recipe = load_changed(Path(run), changes, tiny=False)
        evaluate_recipe(recipe, own=trust_of(recipe, [Path(run)]), **chosen)
        return
    require(
        not changes,
        f"evaluate: --set must come with a recipe file; got the run {run} with --set"
        f" {' '.join(changes)}",
    )
    from pipeline.report.selection import find_run

    evaluate_run(find_run(runs, run), **chosen)


@commands.command(
    rich_help_panel=MODELS,
    epilog=example(
        "spiketrain predict birds-sltt-20260105-120000 robin.jpg holiday/",
        "spiketrain predict birds.safetensors robin.jpg --format json",
    ),
)
def predict(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN|FILE",
            help="folder of a run, or its name under --runs, or a file of spiketrain export",
        ),
    ],
    pictures: Annotated[
        list[Path], typer.Argument(metavar="PICTURE", help="pictures, or folders of pictures")
    ],
    format_: Annotated[
        Literal["table", "json", "csv"],
        typer.Option("--format", help="csv: the classes alone"),
    ] = "table",
    which: Annotated[
        Literal["last", "best"], typer.Option("--which", help="checkpoint of the run")
    ] = "last",
    runs: Runs = RUNS,
    trust: Trust = [],  # noqa: B006
) -> None:
    """Predict the classes of pictures with a trained network.

    The five most probable classes of each picture are printed, the spikes of each layer, and the
    energy of an inference.
    """
    from pipeline.launch.predict import predict as answer
    from pipeline.report.selection import find_run

    source = Path(run) if Path(run).is_file() else find_run(runs, run)
    answer(source, pictures, which=which, trust=tuple(trust)).print(format_)


@commands.command(
    rich_help_panel=MODELS,
    epilog=example(
        "spiketrain export fashion-sltt-20260105-120000",
        "spiketrain export fashion-sltt-20260105-120000 --format torch",
    ),
)
def export(
    run: RunName,
    format_: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help=(
                "plain: for pipeline.load; packed: the same, 1-bit weights 8 to a byte; nir: for"
                " SpikingJelly, snnTorch and chips; torch, torch-step: for torch.export.load, all"
                " time steps or one"
            ),
        ),
    ] = "plain",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="a new file; default: a file in the run's folder",
        ),
    ] = None,
    which: Annotated[
        Literal["last", "best"], typer.Option("--which", help="checkpoint to export")
    ] = "last",
    runs: Runs = RUNS,
    trust: Trust = [],  # noqa: B006
) -> None:
    """Write a trained network as one file.

    The file is for pipeline.load or for other packages. The size of the file is printed, and the
    line that loads it.
    """
    from pipeline.core.printing import new_console, say
    from pipeline.report.selection import find_run
    from pipeline.train.export import export_run

    console = new_console()

    exported = export_run(find_run(runs, run), out, format=format_, which=which, trust=tuple(trust))
    for line in str(exported).splitlines():
        say(console, line)


@commands.command(
    rich_help_panel=MODELS,
    epilog=example(
        "spiketrain check fashion/sltt",
        "spiketrain check mysnn.nets:small --input 4,8,2,32,32",
    ),
)
def check(
    context: typer.Context,
    network: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|RUN|MODULE:BUILDER",
            help=(
                "a recipe file; folder of a run, or its name under --runs; or a function without"
                " arguments that returns a network, and its module"
            ),
        ),
    ],
    shape: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="T,B,...",
            help="shape of the random input of a MODULE:BUILDER: steps, samples, one sample",
        ),
    ] = None,
    format_: Format = "table",
    runs: Runs = RUNS,
    changes: Sets = [],  # noqa: B006
    trust: Trust = [],  # noqa: B006
) -> None:
    """Look for common faults of a spiking network on one batch.

    In float64: samples that depend on their batch, steps in slices that differ from all steps at
    once, state that outlives a batch, wrong gradients, silent layers, and batch norm that differs
    in evaluation. The exit code is 1 if there is a fault.
    """
    network = str(find_recipe(Path(network)))
    is_recipe, is_builder = network.endswith(".py"), ":" in network
    for option, is_given, kind, fits in (
        ("--set", bool(changes), "a recipe file", is_recipe),
        ("--input", shape is not None, "MODULE:BUILDER", is_builder),
        ("--trust", bool(trust), "a run", not is_recipe and not is_builder),
        ("--runs", is_set_by_user(context, "runs"), "a run", not is_recipe and not is_builder),
    ):
        require(fits or not is_given, f"check: {option} must come with {kind}; got {network}")
    if is_builder:
        subject = _built(network, shape)
    elif is_recipe:
        subject = _of_recipe(load_changed(Path(network), changes, tiny=False), network)
    else:
        subject = _of_run(network, runs, tuple(trust))
    from pipeline.measure.check import check as answers

    verdicts = answers(*subject[:2])
    if format_ == "json":
        print(json.dumps([asdict(verdict) for verdict in verdicts], indent=2), flush=True)
    else:
        _print_verdicts(verdicts, subject[2])
    sys.exit(any(verdict.state == "fault" for verdict in verdicts))


@commands.command(rich_help_panel=MODELS, epilog=example("spiketrain models"))
def models() -> None:
    """List the networks that were published for ImageNet.

    The published weights of all are read.
    """
    from pipeline.core.printing import new_console, number, print_table, prose, say
    from pipeline.models import (
        e_spikeformer,
        max_former,
        meta_spikeformer,
        ms_resnet,
        nf_resnet,
        preact_resnet,
        qkformer,
        sew_resnet,
        spike_driven_transformer,
        spikformer,
    )

    transformers = (qkformer, spikformer, spike_driven_transformer, meta_spikeformer)
    transformers += (e_spikeformer, max_former)
    rows = []
    for module in (*transformers, sew_resnet, ms_resnet, nf_resnet, preact_resnet):
        rows += [
            (each.family, each.size, f"{each.parameters / 1e6:.2f}", each.top1, each.source)
            for each in module.PUBLISHED_SIZES
        ]
    console = new_console()
    columns = ("family", "size", number("M"), prose("top-1, %"), "arXiv")
    print_table(console, columns, rows)
    say(
        console,
        "M: million parameters. top-1: published accuracy on ImageNet at 224 pixels, not measured"
        " here (-: none is known here). from_published of each family's module makes the network"
        " from published weights. Their names and shapes map to ours and back, and with"
        " random weights the logits are those of the published code (docs/LOG.md). No published"
        " file of weights was read.",
    )


def _of_recipe(recipe: Any, name: str) -> "tuple[nn.Module, Tensor, str]":
    """The network of a recipe, a batch, and where it comes from."""
    require(
        isinstance(recipe, Recipe),
        f"check: the file must have one recipe; got several in {name}",
    )
    from pipeline.core.errors import DataError
    from pipeline.forecast.bench import Bench

    try:
        bench, source = Bench(recipe, batch_size=SAMPLES), "of the training data"
    except DataError as error:
        bench = Bench(recipe, batch_size=SAMPLES, needs_data=False)
        source = f"of random values, because the data cannot be read: {error}"
    return bench.network, bench.x_TB, f"{SAMPLES} samples {source}"


def _of_run(name: str, runs: Path, trust: tuple[str, ...]) -> "tuple[nn.Module, Tensor, str]":
    """As `_of_recipe`, with the weights of a run."""
    from pipeline.core.run_folder import RunFolder
    from pipeline.report.selection import find_run
    from pipeline.train.weights import load_run

    folder = find_run(runs, name)
    recipe = Recipe.read(RunFolder(folder).recipe, trust=trust)
    network, x_TB, source = _of_recipe(recipe, name)
    network.load_state_dict(load_run(folder, trust=trust).state_dict())
    return network, x_TB, source


def _built(target: str, shape: str | None) -> "tuple[nn.Module, Tensor, str]":
    """As `_of_recipe`, for the network that MODULE:BUILDER returns."""
    sizes = (shape or "").split(",")
    require(
        len(sizes) >= 3 and all(size.isdecimal() and int(size) for size in sizes),
        "check: MODULE:BUILDER needs --input T,B,... with the sizes of the input, such as"
        f" 4,8,2,32,32; got {'no --input' if shape is None else shape}",
    )
    module, _, name = target.partition(":")
    as_module = ".".join(Path(module).with_suffix("").parts)
    require(
        not module.endswith(".py"),
        f"check: MODULE:BUILDER must have the name of a module, not of a file; got {target}, try"
        f" {as_module}:{name}",
    )
    import torch

    sys.path.append(os.getcwd())  # noqa: PTH109
    try:
        builder = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"check: MODULE:BUILDER must be a function that can be imported; got {target}: {error}"
        ) from error
    require(
        callable(builder),
        f"check: MODULE:BUILDER must be a function without arguments; got {target}, which is"
        f" {builder!r}",
    )
    try:
        network = builder()
    except Exception as error:
        message = " ".join(str(error).split())
        raise ValueError(
            f"check: {target} must run without arguments; got {type(error).__name__}: {message}"
        ) from error
    require(
        isinstance(network, torch.nn.Module),
        f"check: {target} must return a torch.nn.Module; got {type(network).__name__}",
    )
    x_TB = torch.rand(*map(int, sizes), generator=torch.Generator().manual_seed(0))
    return network, x_TB, f"{sizes[1]} samples of random values"


def _print_verdicts(verdicts: Any, source: str) -> None:
    from rich.text import Text

    from pipeline.core.printing import new_console, say

    console = new_console()
    styles = {"ok": "", "note": "bold", "fault": "bold red"}
    for verdict in verdicts:
        label = Text.assemble((f"{verdict.state:5}", styles[verdict.state]), " ")
        label.append(f"{verdict.question:10}")
        indent = " " * label.cell_len
        if verdict.module:
            say(console, verdict.module, label=label, style="bold")
            label = Text(indent)
        say(console, verdict.text, label=label)
        if verdict.advice:
            say(console, f"to do: {verdict.advice}", label=indent)
    say(console, f"checked on {source}")
