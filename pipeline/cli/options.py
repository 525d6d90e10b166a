"""Options that several commands share, `--set`, and the reading of a recipe file.

Modules of the command line import at their top only rich, typer, and modules that need nothing but
the standard library. Each command itself imports the modules that need torch, Ray or MLflow.
"""

import ast
import inspect
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from pipeline.core.checks import require
from pipeline.core.printing import ACCENT
from pipeline.core.run_folder import RunFolder
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.recipe_files import find_recipe, load_recipe
from pipeline.recipe.suite import Suite, is_suite

# The groups of commands in `spiketrain --help`
TRAIN, COMPARE, DATA, MODELS, CLUSTER = "Train", "Compare", "Data", "Models", "Cluster"


def example(*commands: str) -> str:
    """The text below a command's help. Each command has a line of its own, so it can be copied."""
    return "\n".join(("Example:", *(f"[{ACCENT}]{each}[/]" for each in commands)))


class Command(TyperCommand):
    """A command that refuses two values for an option that takes one value. Without this
    check, the first value would have no effect. Its help has one line for each paragraph, which
    the terminal wraps.
    """

    def __init__(self, *args: Any, help: str | None = None, **settings: Any) -> None:
        one_line = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(help or ""))
        super().__init__(*args, help=one_line, **settings)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, typed = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in typed:
            count = sum(each is parameter for each in typed)
            if count > 1 and not (
                getattr(parameter, "multiple", False) or getattr(parameter, "is_flag", False)
            ):
                raise ValueError(
                    f"{self.name}: {parameter.opts[0]} takes one value; it was given {count} times"
                )
        return super().parse_args(ctx, args)


class Commands(typer.Typer):
    """An app whose commands are instances of `Command`."""

    def command(self, *args: Any, **settings: Any) -> Any:
        return super().command(*args, cls=Command, **settings)


def number_option(name: str, **settings: Any) -> Any:
    """An option for a finite number. typer's ranges admit `nan`, and open ranges admit `inf`."""

    def finite(value: float | None) -> float | None:
        if value is not None and not math.isfinite(value):
            raise typer.BadParameter(f"it must be a finite number; got {value}")
        return value

    return typer.Option(name, callback=finite, **settings)


def count_option(name: str, *, noun: str, **settings: Any) -> Any:
    """An option for a count or `auto`. `noun`: the counted things, for the message."""

    def parse(context: typer.Context, value: str | None) -> int | str | None:
        if value is None or value == "auto":
            return value
        if not value.isdecimal() or int(value) < 1:
            raise ValueError(
                f"{context.info_name}: {name} must be a number of {noun} or auto; got {value}"
            )
        return int(value)

    return typer.Option(name, callback=parse, **settings)


def run_names(context: typer.Context, incomplete: str) -> list[str]:
    """The names of runs and suites that a shell offers for the beginning of a name."""
    folder = Path(context.params.get("runs") or RUNS)
    folders = sorted(folder.iterdir()) if folder.is_dir() else []
    return [
        each.name
        for each in folders
        if each.name.startswith(incomplete) and (RunFolder(each).recipe.exists() or is_suite(each))
    ]


RecipeFile = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="a Python file that defines recipe(), or a packaged recipe such as fashion/sltt",
        callback=find_recipe,
    ),
]
RunOrSuite = Annotated[
    str,
    typer.Argument(
        metavar="RUN|SUITE",
        help="folder of a run or suite, or its name under --runs",
        autocompletion=run_names,
    ),
]
RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="folder of a run, or its name under --runs",
        autocompletion=run_names,
    ),
]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="folder that contains the runs")]
Sets = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="change the recipe, for example optimizer.lr=0.05; repeatable",
    ),
]
Trust = Annotated[
    list[str],
    typer.Option(
        "--trust",
        metavar="PACKAGE",
        help=("your own package that defines parts of a recipe, or a suite's report; repeatable"),
        callback=lambda packages: list(dict.fromkeys(packages)),
    ),
]
Format = Annotated[Literal["table", "json"], typer.Option("--format", help="print tables or JSON")]
Tiny = Annotated[bool, typer.Option("--tiny", help="shrink the recipe to seconds on a CPU")]
Workers = Annotated[int, typer.Option("--workers", min=1, help="processes that train together")]

RUNS = Path("runs")

# ---- options of launch and resume; in resume, None stands for the saved value, except of Address

SIZES = "N|MIN:MAX|N,N,..."
SIDE_BY_SIDE = "number of runs of a suite that train at the same time, on separate cores and GPUs"
Inline = Annotated[bool, typer.Option("--inline", help="one worker in this process, without Ray")]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="address of a Ray cluster: auto or host:6379; local or no address: start one here",
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "gpu"] | None,
    typer.Option("--device", help="auto: GPUs if there are any, else the CPU"),
]
Cores = Annotated[
    str | None,
    count_option(
        "--cpus-per-worker",
        noun="cores",
        metavar="N|auto",
        help="a worker's cores and torch threads; auto: with a GPU, a node's cores per GPU; else 1",
    ),
]
Loaders = Annotated[
    str | None,
    count_option(
        "--loader-threads",
        noun="threads",
        metavar="N|auto",
        help="threads that read data in a worker; auto: with a GPU, one per core; else 1",
    ),
]
Restarts = Annotated[
    int | None,
    typer.Option(
        "--max-restarts", min=0, help="maximum restarts of dead workers between two checkpoints"
    ),
]
Hang = Annotated[
    float | None,
    number_option(
        "--hang-minutes",
        min=0,
        help="minutes without progress after which a worker is restarted; 0: never",
    ),
]
Verify = Annotated[
    Literal["sampled", "full"] | None,
    typer.Option(
        "--verify",
        help="compare data with checksums while reading; sampled: one sample in 256; full: all",
    ),
]
NodeLoss = Annotated[
    Literal["fast", "patient"] | None,
    typer.Option(
        "--node-loss",
        help="when a silent node counts as lost; fast: after 4 s; patient: after 30 s or more",
    ),
]


def is_set_by_user(context: typer.Context, name: str) -> bool:
    """Whether the user has set an option, on the command line or in the environment."""
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def load_changed(path: Path, changes: list[str], tiny: bool) -> Recipe | Suite:
    """Load a recipe file, apply the changes of --set, and with `tiny` shrink the result."""
    changed = load_recipe(path).override(parse_changes(changes))
    return changed.tiny() if tiny else changed


def parse_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Keys and values of `["optimizer.lr=0.05", "precision=bf16"]`.

    A value that is not a Python literal is text.

    Raises:
        ValueError: a text has no `=`, or no key before the `=`.
    """
    changes: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        require(
            equals and key.strip(),
            f"--set: must look like key=value, for example optimizer.lr=0.05; got {text!r}",
        )
        try:
            changes[key.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changes[key.strip()] = value
    return changes
