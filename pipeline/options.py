"""Options that several commands share, and what a recipe file makes with them. Nothing heavy is imported before it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.recipe import Recipe
    from pipeline.suite import Suite

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="a Python file that defines recipe()")]
RecipeFiles = Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Python files that define recipe()")]
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
Sizes = Annotated[
    str,
    typer.Option(
        "--workers", metavar="N|MIN:MAX|N,N,...", help="processes that train together; of several, what there is room for"
    ),
]
Inline = Annotated[bool, typer.Option("--inline", help="one worker in this process, without Ray")]
Address = Annotated[
    str | None, typer.Option("--address", help="of a Ray cluster: auto, host:6379; without it, or with local, one starts here")
]
Cpus = Annotated[int, typer.Option("--cpus-per-worker", min=1, help="cores reserved for a worker, and its torch threads")]

RUNS = Path("runs")


def made_of(path: Path, changes: list[str], tiny: bool) -> Recipe | Suite:
    from pipeline.recipe_file import load_recipe, parse_changes

    made = load_recipe(path).override(parse_changes(changes))
    return made.tiny() if tiny else made


def only_recipe(path: Path, changes: list[str], tiny: bool, *, who: str) -> Recipe:
    """As `made_of`, of a file that holds one."""
    from pipeline.recipe import Recipe

    made = made_of(path, changes, tiny)
    if not isinstance(made, Recipe):
        names = ", ".join(each.name for each in made.recipes)
        raise ValueError(f"{who}: the file must hold one recipe; got a suite of {len(made.recipes)}: {names}")
    return made
