"""Several recipes that are trained in order and reported together.

A suite is written to suite.json.

    Suite(recipes=(first, replace(first, name="second", init="@first", rule=spec(SLTT))),
          report=table)

`@NAME`, in `init` or in a path keyword of a part, is a reference to an earlier recipe of the suite:
it stands for the trained weights of that recipe. A `Choice` takes one field from the best of
earlier trials. Each recipe becomes a run of its own, beside the suite's folder.

The last part of this module makes the command lines that messages print for the user to type.
"""

import inspect
import json
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.core.checks import require
from pipeline.core.run_folder import RunFolder
from pipeline.recipe import own_code
from pipeline.recipe.json import (
    check_format,
    decode,
    dotted,
    imported,
    is_trusted,
    read_json,
    targets,
    walk,
    write_json,
)
from pipeline.recipe.recipe import TRUSTED as PARTS
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.spec import arguments_of, reference_to, referred

# A function that prints a suite's results. Its first argument has the folder of each recipe's run
# and the file of each measurement, by name and in order. All runs have finished or diverged
# (pipeline/track/run_state.py). The second argument is rich's Console. The function may return a
# JSON value, which `compare --format json` prints. If the value is an object, `report` shows its
# "claims" (report/claims.py) and its "sweeps" (outputs of `sweep --format json`).
Report = Callable[[Mapping[str, Path], Any], object]

_Kind = Literal["sweep", "interleaved", "plan"]
FILE = "suite.json"
FORMAT = 1
# Packages that may define a report. A package of parts is not among them: a part is no report.
TRUSTED = ("recipes", "pipeline.report")


@dataclass(frozen=True)
class Choice:
    """A field whose value comes from the trial with the best top-1.

    Fields:
        field: its dotted key, such as optimizer.lr
        trials: names of earlier recipes, each with its own value of the field; the first of equal
            results is chosen
    """

    field: str
    trials: tuple[str, ...]


@dataclass(frozen=True)
class Measurement:
    """Costs that a suite's report needs besides the runs. They are measured after all runs.

    The result is a JSON file in the suite's folder. A resume measures only if the file is missing.

    Fields:
        kind: the function of pipeline.forecast that measures: see pipeline/launch/suite.py
        of: names of recipes of the suite, or recipes that the suite does not train. The first
            recipe is measured, with the rules of all of them
        options: keywords of the function, as JSON values

    Raises: ValueError for an unknown kind, no recipe, or a name with other characters than small
    letters, digits and hyphens.
    """

    name: str
    kind: _Kind
    of: tuple[str | Recipe, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(
            self.kind in get_args(_Kind) and self.of,
            "suite: a measurement needs recipes and one of the kinds"
            f" {', '.join(get_args(_Kind))}; got kind {self.kind!r} and {len(self.of)} recipes",
        )
        require(
            re.fullmatch("[a-z0-9-]+", self.name),
            "suite: a measurement's name must have only small letters, digits and hyphens; got"
            f" {self.name!r}",
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "of": [each if isinstance(each, str) else each.to_json() for each in self.of],
            "options": dict(self.options),
        }


@dataclass(frozen=True)
class Suite:
    """Recipes in training order, with a report of their results.

    Fields:
        report: prints the results; None: a comparison per study and conditions is printed
        choices: by the name of the recipe that takes the chosen value
        measurements: costs that the report needs. Without a report, sweeps are printed and drawn

    Raises: ValueError for equal names, or for a reference, choice or measurement of a recipe that
    is not in the suite or comes later.
    """

    recipes: tuple[Recipe, ...]
    report: Report | None = None
    choices: Mapping[str, Choice] = field(default_factory=dict)
    measurements: tuple[Measurement, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipes", tuple(self.recipes))
        require(
            self.recipes and all(isinstance(each, Recipe) for each in self.recipes),
            f"suite: recipes must be Recipes, at least one; got {self.recipes!r}",
        )
        names: list[str] = []
        for recipe in self.recipes:
            require(
                recipe.name not in names,
                f"suite: recipes must have different names; got two recipes {recipe.name!r}",
            )
            for reference in references(recipe):
                require(
                    reference in names,
                    f"suite: a reference must name an earlier recipe; got '@{reference}' in"
                    f" {recipe.name}; earlier recipes: {', '.join(names) or 'none'}",
                )
            if choice := self.choices.get(recipe.name):
                recipe.value_of(choice.field)
                require(
                    choice.trials,
                    f"suite: a choice needs trials; {recipe.name} has none for {choice.field}",
                )
                later = [repr(trial) for trial in choice.trials if trial not in names]
                require(
                    not later,
                    f"suite: a trial must be an earlier recipe; got {', '.join(later)} for"
                    f" {recipe.name}",
                )
            names.append(recipe.name)
        unknown = set(self.choices) - set(names)
        require(
            not unknown,
            f"suite: a choice must have the name of a recipe; got {', '.join(sorted(unknown))}",
        )
        for measurement in self.measurements:
            unknown = {each for each in measurement.of if isinstance(each, str)} - set(names)
            require(
                measurement.name not in names and not unknown,
                "suite: a measurement must have a unique name and recipes of the suite; got"
                f" {measurement.name} with unknown recipes: {', '.join(sorted(unknown)) or 'none'}",
            )
            names.append(measurement.name)
        if self.report is not None:
            _check_report(self.report)
        require(
            self.report is not None or all(each.kind == "sweep" for each in self.measurements),
            "suite: measurements other than sweeps need a report that reads them; got none",
        )

    @property
    def family(self) -> str:
        """The MLflow experiment of all runs.

        MLflow shows children only inside their parent's experiment.
        """
        return next((each.family for each in self.recipes if each.family), self.recipes[0].name)

    def override(self, changes: Mapping[str, Any]) -> "Suite":
        """The same suite with `Recipe.override` applied to each recipe.

        Raises:
            ValueError: a change does not fit a recipe, or changes a field that trials choose.
        """
        chosen = {choice.field for choice in self.choices.values()} & set(changes)
        require(
            not chosen,
            f"suite: {', '.join(chosen)} is chosen by trials and must not be changed; got a value",
        )
        recipes = []
        for recipe in self.recipes:
            try:
                recipes.append(recipe.override(changes))
            except ValueError as error:
                raise ValueError(
                    f"suite: {recipe.name} does not accept the change; {error}"
                ) from error
        return replace(self, recipes=tuple(recipes))

    def tiny(self) -> "Suite":
        """The same suite of `Recipe.tiny` recipes, without its report and measurements."""
        names = {recipe.name: recipe.tiny().name for recipe in self.recipes}
        choices = {
            names[name]: replace(choice, trials=tuple(names[trial] for trial in choice.trials))
            for name, choice in self.choices.items()
        }
        return Suite(
            tuple(
                fill_references(recipe.tiny(), lambda name: reference_to(names[name]))
                for recipe in self.recipes
            ),
            choices=choices,
        )

    def resolved(self) -> "Suite":
        """The same suite with absolute paths. References are unchanged."""
        return replace(
            self,
            recipes=tuple(recipe.resolved() for recipe in self.recipes),
            measurements=tuple(
                replace(
                    each,
                    of=tuple(
                        item if isinstance(item, str) else item.resolved() for item in each.of
                    ),
                )
                for each in self.measurements
            ),
        )

    @property
    def all_recipes(self) -> tuple[Recipe, ...]:
        """The recipes of the suite, and the recipes that only its measurements use."""
        return (
            *self.recipes,
            *(
                each
                for measurement in self.measurements
                for each in measurement.of
                if isinstance(each, Recipe)
            ),
        )


def references(recipe: Recipe) -> tuple[str, ...]:
    """The names that a recipe refers to, each once."""
    names: dict[str, str] = {}
    fill_references(recipe, lambda name: names.setdefault(name, reference_to(name)))
    return tuple(names)


def fill_references(recipe: Recipe, path_of: Callable[[str], str | Path]) -> Recipe:
    """The recipe with each reference `@NAME` replaced by the path `path_of(NAME)`."""

    def fill(path: str) -> str:
        name = referred(path)
        return path if name is None else str(path_of(name))

    return recipe.with_paths(fill)


def refuse_references(recipe: Recipe) -> None:
    """Refuse the references of a recipe that is not in a suite.

    Raises:
        ValueError: the recipe has a reference.
    """
    if names := references(recipe):
        raise ValueError(
            f"recipe: '@{names[0]}' must name an earlier recipe of the same suite; got"
            f" {recipe.name} without a suite: use the path of a run's folder or of a weights file"
        )


def targets_of(workload: Recipe | Suite) -> list[str]:
    """The dotted names of parts and of the report that cannot be imported without `--trust`."""
    is_suite = isinstance(workload, Suite)
    recipes, report = (workload.all_recipes, workload.report) if is_suite else ((workload,), None)
    parts = [(name, PARTS) for recipe in recipes for name in targets(recipe.to_json())]
    reports = [] if report is None else [(dotted(report), TRUSTED)]
    return [name for name, trusted in parts + reports if not is_trusted(name, trusted)]


def refuse_untrusted(suite: Suite, trust: Collection[str]) -> None:
    """Refuse a suite that could not be read back with these trusted packages.

    Raises:
        ValueError: a part of a recipe, or the report, is not trusted.
    """
    for recipe in suite.all_recipes:
        Recipe.from_json(recipe.to_json(), trust=trust)
    if suite.report is not None:
        imported(dotted(suite.report), (*TRUSTED, *trust), subject=FILE)


# --------------------------------------------------------------------------------------- suite.json


@dataclass(frozen=True, kw_only=True)
class SuiteFile:
    """The content of suite.json, from which a resume continues the suite."""

    suite: Suite  # paths absolute, references as they were written
    runs: tuple[str, ...]  # the name of each recipe's run folder, beside the suite's folder
    parent: str  # the id that groups the runs in MLflow: 32 hex digits
    cluster: Mapping[str, Any]  # fields of pipeline.launch.cluster.Cluster

    def to_json(self) -> dict[str, Any]:
        choices = {name: {"choice": asdict(each)} for name, each in self.suite.choices.items()}
        return {
            "version": FORMAT,
            "parent": self.parent,
            "cluster": dict(self.cluster),
            "report": None if self.suite.report is None else dotted(self.suite.report),
            "measurements": [each.to_json() for each in self.suite.measurements],
            "children": [
                {"run": run, "recipe": each.to_json(), **choices.get(each.name, {})}
                for run, each in zip(self.runs, self.suite.recipes, strict=True)
            ],
        }

    @classmethod
    def from_json(cls, value: Any, *, own: str = "", trust: Collection[str] = ()) -> "SuiteFile":
        """Read a suite from JSON. Only trusted names are imported.

        Args:
            own: the name of the suite's folder, which no run may have.

        Raises:
            ValueError: the format version is another one, a field is damaged, a run's name leads
                out of the folder of runs, a target is not trusted, or a recipe is no longer valid.
        """
        children = list(_children(value, own=own))
        parent, cluster, report = value.get("parent"), value.get("cluster"), value.get("report")
        require(
            isinstance(parent, str) and re.fullmatch("[0-9a-f]{32}", parent),
            f"suite.json: parent must be 32 hex digits; got {parent!r}",
        )
        require(
            isinstance(cluster, Mapping), f"suite.json: cluster must be an object; got {cluster!r}"
        )
        function = None if report is None else imported(report, (*TRUSTED, *trust), subject=FILE)
        recipes = tuple(Recipe.from_json(child["recipe"], trust=trust) for child in children)
        choices = {
            recipe.name: Choice(
                **decode(arguments_of(Choice, child["choice"], subject=f"{FILE}: a choice"), ())
            )
            for recipe, child in zip(recipes, children, strict=True)
            if "choice" in child
        }
        return cls(
            suite=Suite(
                recipes,
                function,
                choices,
                tuple(_measurement(each, trust) for each in value.get("measurements") or ()),
            ),
            runs=tuple(child["run"] for child in children),
            parent=parent,
            cluster=cluster,
        )

    def write(self, folder: Path) -> None:
        write_json(folder / FILE, self.to_json())

    @classmethod
    def read(cls, folder: Path, *, trust: Collection[str] = ()) -> "SuiteFile":
        """The suite in a folder.

        Raises:
            ValueError: suite.json does not exist, or as `from_json`.
        """
        try:
            if trust:
                own_code.make_importable(own_code.read(folder), trust)
            return cls.from_json(read_json(folder / FILE), own=folder.absolute().name, trust=trust)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error


def is_suite(folder: Path) -> bool:
    return (folder / FILE).is_file()


def has_report(folder: Path) -> bool:
    """Whether a suite has a report function. No code is imported."""
    return read_json(folder / FILE).get("report") is not None


def runs_of(folder: Path) -> dict[str, Path]:
    """The run folder of each recipe, by the recipe's name, in order. No code is imported.

    Raises:
        ValueError: suite.json is damaged, or a run's folder is a file.
    """
    runs = {
        child["recipe"]["recipe"]["name"]: folder.parent / child["run"]
        for child in _children_in(folder)
    }
    for run in runs.values():
        require(
            not run.exists() or run.is_dir(), f"{folder}: a run must be a folder; {run} is a file"
        )
    return runs


def measured_in(folder: Path) -> dict[str, Path]:
    """The file of each measurement of a suite, by the measurement's name. Some may not exist yet.

    Raises:
        ValueError: suite.json is damaged.
    """
    entries = read_json(folder / FILE).get("measurements") or ()
    try:
        return {
            each["name"]: folder / f"measured-{Path(each['name']).name}.json" for each in entries
        }
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / FILE}: a measurement must have a name; got {entries!r}"
        ) from error


def sources_in(folder: Path) -> set[str]:
    """The names of the recipes that others refer to. No code is imported.

    Raises:
        ValueError: suite.json is damaged.
    """
    return {
        name
        for child in _children_in(folder)
        for text in walk(child["recipe"])
        if isinstance(text, str) and (name := referred(text))
    }


def _children_in(folder: Path) -> list[dict[str, Any]]:
    try:
        return list(_children(read_json(folder / FILE), own=folder.absolute().name))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _children(value: Any, *, own: str) -> Iterator[dict[str, Any]]:
    """Yield the children in suite.json. Check the version, and that no run's name is a path."""
    check_format(value, FORMAT, subject=FILE)
    children = value.get("children")
    require(
        isinstance(children, list) and children,
        f"suite.json: children must be a list with at least one entry; got {children!r}",
    )
    seen = {own}
    for child in children:
        try:
            run, name = child["run"], child["recipe"]["recipe"]["name"]
        except (TypeError, KeyError, IndexError):
            raise ValueError(
                f"suite.json: a child must have a run and a recipe; got {child!r}"
            ) from None
        require(isinstance(name, str), f"suite.json: a recipe's name must be text; got {name!r}")
        require(
            isinstance(run, str) and run not in ("", "..", *seen) and Path(run).name == run,
            f"suite.json: a run must be a unique name in the folder of runs; got {run!r}",
        )
        seen.add(run)
        yield child


def _measurement(value: Any, trust: Collection[str]) -> Measurement:
    try:
        recipes = tuple(
            each if isinstance(each, str) else Recipe.from_json(each, trust=trust)
            for each in value["of"]
        )
        return Measurement(**{**value, "of": recipes})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{FILE}: a measurement must have name, kind, of and options; got {value!r}"
        ) from error


def _check_report(report: Any) -> None:
    rule = "suite: report must be a top-level function of a module, called with (runs, console)"
    is_function = inspect.isfunction(report) and report.__qualname__ == report.__name__
    require(is_function and report.__name__.isidentifier(), f"{rule}; got {report!r}")
    try:
        inspect.signature(report).bind({}, None)
    except TypeError as error:
        raise ValueError(
            f"{rule}; got {report.__name__}{inspect.signature(report)}: {error}"
        ) from None


# --------------------------------------------------------------------------------- printed commands


# A placeholder for the address of a Ray cluster, which the user must type: a folder must not decide
# which host receives the token.
ADDRESS = "ADDRESS"


def command(verb: str, folder: Path, *, address: str | None = None) -> str:
    """`spiketrain VERB NAME` for the folder of a run or suite, with all necessary options.

    The `--trust` words are only printed, never applied automatically. A folder may come from
    somebody else, so the user decides which packages to trust.
    """
    address_words = [] if address is None else ["--address", address]
    return shlex.join(
        [
            "spiketrain",
            verb,
            folder.name,
            *_runs_words(folder.parent),
            *address_words,
            *trust_words(own_code.names(folder)),
        ]
    )


def dashboard_command(runs: Path) -> str:
    """`spiketrain dashboard` for a folder of runs."""
    return shlex.join(["spiketrain", "dashboard", *_runs_words(runs)])


def _runs_words(runs: Path) -> list[str]:
    return [] if runs.absolute() == Path("runs").absolute() else ["--runs", str(runs)]


def how_to_resume(folder: Path) -> str:
    """`spiketrain resume NAME`, with `--address ADDRESS` if the launch was on a Ray cluster."""
    return command("resume", folder, address=ADDRESS if _was_on_a_cluster(folder) else None)


def trust_words(trust: Sequence[str]) -> list[str]:
    """The `--trust` words of a command."""
    return [word for package in trust for word in ("--trust", package)]


def _was_on_a_cluster(folder: Path) -> bool:
    suite = folder / FILE
    try:
        cluster = (
            json.loads(suite.read_bytes())["cluster"]
            if suite.exists()
            else json.loads(RunFolder(folder).cluster.read_bytes())
        )
        return cluster["address"] is not None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # the file is damaged; a resume reports the damage
        return False
