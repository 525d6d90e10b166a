"""Options that several commands share, `--set`, and the reading of a recipe file.

Modules of the command line import at their top only what needs the standard library alone, rich and
typer. What imports torch, Ray or MLflow is imported by the command that needs it.
"""

import ast
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from pipeline.core.checks import require
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.recipe_files import load_recipe
from pipeline.recipe.suite import Suite


class Command(TyperCommand):
    """A command that refuses a repeated option if the option takes one value: the first value would
    have no effect.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in given:
            times = sum(each is parameter for each in given)
            if times > 1 and not (
                getattr(parameter, "multiple", False) or getattr(parameter, "is_flag", False)
            ):
                raise ValueError(
                    f"{self.name}: {parameter.opts[0]} takes one value; it was given {times} times"
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


def count_option(name: str, *, of: str, **settings: Any) -> Any:
    """An option for a count or `auto`. `of`: what is counted."""

    def parse(context: typer.Context, value: str | None) -> int | str | None:
        if value is None or value == "auto":
            return value
        if not value.isdecimal() or int(value) < 1:
            raise ValueError(
                f"{context.info_name}: {name} must be a number of {of} or auto; got {value}"
            )
        return int(value)

    return typer.Option(name, callback=parse, **settings)


RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="a Python file that defines recipe()")
]
RunOrSuite = Annotated[
    str, typer.Argument(metavar="RUN|SUITE", help="its folder, or its name under --runs")
]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="a run's folder, or its name under --runs")
]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="the folder of runs")]
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
        help=(
            "a package of your own that parts of a recipe, or a suite's report, are from;"
            " repeatable"
        ),
        callback=lambda packages: list(dict.fromkeys(packages)),
    ),
]
Tiny = Annotated[bool, typer.Option("--tiny", help="shrink the recipe to seconds on a CPU")]
Workers = Annotated[int, typer.Option("--workers", min=1, help="processes that train together")]

RUNS = Path("runs")

# ------------------- options of launch, and of resume, where None stands for "as it was launched"

SIZES = "N|MIN:MAX|N,N,..."
AT_A_TIME = "runs of a suite at a time, each on cores and cards of its own"
Inline = Annotated[bool, typer.Option("--inline", help="one worker in this process, without Ray")]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="of a Ray cluster: auto, host:6379; without it, or with local, one starts here",
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "gpu"] | None,
    typer.Option("--device", help="auto takes GPUs where there are any"),
]
Cores = Annotated[
    str | None,
    count_option(
        "--cpus-per-worker",
        of="cores",
        metavar="N|auto",
        help="cores of a worker, and its torch threads; auto: the node's cores per GPU",
    ),
]
Loaders = Annotated[
    str | None,
    count_option(
        "--loader-threads",
        of="threads",
        metavar="N|auto",
        help="that read data in each worker; auto: one per core with a GPU",
    ),
]
Restarts = Annotated[
    int | None,
    typer.Option("--max-restarts", min=0, help="of dead workers, without a new checkpoint between"),
]
Hang = Annotated[
    float | None,
    number_option(
        "--hang-minutes",
        min=0,
        help="without a sign of life, before a worker is restarted; 0: never",
    ),
]
Verify = Annotated[
    Literal["sampled", "full"] | None,
    typer.Option(
        "--verify",
        help="compare pages of the data while reading: for one sample in 256, or for each",
    ),
]
NodeLoss = Annotated[
    Literal["fast", "patient"] | None,
    typer.Option(
        "--node-loss",
        help="fast: continue without a node that does not answer; patient: wait",
    ),
]


def is_typed(context: typer.Context, name: str) -> bool:
    """Whether the user has given an option, by the command line or the environment."""
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def made_of(path: Path, changes: list[str], tiny: bool) -> Recipe | Suite:
    """The recipe or suite of a recipe file, with the changes of --set, or in its tiny form."""
    made = load_recipe(path).override(parse_changes(changes))
    return made.tiny() if tiny else made


def parse_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Keys and values of `["optimizer.lr=0.05", "precision=bf16"]`.

    Values are Python literals; anything else is text.

    Raises:
        ValueError: a text without `=`.
    """
    changes: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        require(
            equals and key,
            f"--set: must look like key=value, for example optimizer.lr=0.05; got {text!r}",
        )
        try:
            changes[key.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changes[key.strip()] = value
    return changes
