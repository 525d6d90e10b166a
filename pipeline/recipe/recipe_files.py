"""Load recipe files, and find the packages that must be trusted to read a run's recipe again."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.core.checks import require
from pipeline.recipe import own_code
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.suite import Suite, targets_of

_ANONYMOUS = "recipe_file_"  # prefix of the module name of a file that cannot be imported by name


def find_recipe(path: Path) -> Path:
    """The file of a packaged recipe for a name such as `fashion/sltt`; other paths as they are."""
    return path if path.exists() else _packaged_recipes().get(path.as_posix(), path)


def _packaged_recipes() -> dict[str, Path]:
    """The files of the packaged recipes by name."""
    package = own_code.find_spec("recipes")
    if package is None or package.origin is None:
        return {}
    folder = Path(package.origin).parent
    return {
        file.relative_to(folder).with_suffix("").as_posix(): file
        for file in sorted(folder.glob("*/*.py"))
        if not file.stem.endswith(("base", "__"))  # these define no recipe
    }


def _similar_names(path: Path) -> str:
    """The packaged recipes in a folder of this name, or those with similar names, as a text."""
    names = _packaged_recipes()
    similar = [name for name in names if name.startswith(f"{path.name}/")]
    similar = similar or get_close_matches(path.as_posix(), names)
    return f"; packaged: {', '.join(similar)}" if similar else ""


def load_recipe(path: Path) -> Recipe | Suite:
    """Run a recipe file and call its `recipe()`.

    A list of recipes becomes a suite without a report.

    Raises:
        ValueError: the file does not exist, raises an error, or has no `recipe()` that returns
            recipes. The message names the line if the file raised the error.
    """
    require(
        path.is_file() and path.suffix == ".py",
        "recipe: must be a Python file that defines recipe(), or the name of a packaged one, such"
        f" as fashion/sltt; got {path}"
        + ("" if path.exists() else ", which does not exist")
        + ("" if path.is_file() else _similar_names(path)),
    )
    try:
        function: Any = getattr(_import_file(path), "recipe", None)
        require(
            function is not None,
            "must define a function recipe() that returns a Recipe or several; it does not",
        )
        result = function()
        is_list = isinstance(result, (list, tuple)) and result
        if is_list and all(isinstance(each, Recipe) for each in result):
            return Suite(tuple(result))
    except (Exception, SystemExit) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        message = " ".join(str(error).split())
        raise ValueError(f"{path}:{_line_of(error, path)} {kind}{message}") from error
    if not isinstance(result, (Recipe, Suite)):
        raise ValueError(
            f"{path}: recipe() must return a Recipe, a list of them or a Suite; got {result!r}"
        )
    return result


def trust_of(
    workload: Recipe | Suite, paths: Sequence[Path], trust: Sequence[str] = ()
) -> tuple[str, ...]:
    """The packages that must be trusted to read back a run of these recipe files, each once.

    Candidates are the names of `--trust` and the modules of the recipe files, because a user who
    runs a file trusts it. The result has the candidates that define a part or a report that is not
    trusted by default.

    Args:
        trust: the values of `--trust`.

    Raises:
        ValueError: a name in `trust` cannot be imported.
    """
    unknown = [name for name in trust if own_code.find_spec(name) is None]
    require(
        not unknown,
        f"--trust: must name a package or module that can be imported; got {', '.join(unknown)}",
    )
    files = [path.resolve() for path in paths]
    modules = [
        name
        for name, module in list(sys.modules.items())
        if name.rpartition(".")[2] in {path.stem for path in paths}
        and Path(getattr(module, "__file__", None) or "").resolve() in files
    ]
    return own_code.needed((*trust, *modules), targets_of(workload))


def refuse_unnamed(workload: Recipe | Suite, paths: Sequence[Path]) -> None:
    """Refuse parts that a recipe file defines but that cannot be imported again.

    Raises:
        ValueError: a file that defines a part has a name that is not importable, or that another
            module has.
    """
    targets = targets_of(workload)
    for path in paths:
        require(
            not any(target.startswith(f"{_ANONYMOUS}{path.stem}.") for target in targets),
            f"{path}: a file that defines parts must have an importable name (letters, digits, _)"
            f" that no other module has; got {path.name}",
        )


def _import_file(path: Path) -> ModuleType:
    """Import a recipe file under its importable name, such as `recipes.fashion.sltt`.

    recipe.json can then name the parts that the file defines. If the file is outside of any
    package, its folder is appended to `sys.path`, so that the file can import modules beside it. A
    file without an importable name gets a module name of its own.
    """
    resolved = path.resolve()
    folder = resolved.parent
    roots = [Path(entry or ".").resolve() for entry in sys.path]
    for root in (*(parent for parent in resolved.parents if parent in roots), folder):
        if folder not in roots and (root == folder or not (folder / "__init__.py").exists()):
            sys.path.append(str(folder))
        name = ".".join(resolved.relative_to(root).with_suffix("").parts)
        if not all(part.isidentifier() for part in name.split(".")):
            continue
        package = name.rpartition(".")[0]
        if package and own_code.find_spec(package) is None:
            continue
        module_spec = importlib.util.find_spec(name)
        if module_spec is not None and Path(module_spec.origin or "").resolve() == resolved:
            return importlib.import_module(name)
    module_spec = importlib.util.spec_from_file_location(f"{_ANONYMOUS}{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def _line_of(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"{error.lineno}:"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == path.resolve()
    ]
    return f"{lines[-1]}:" if lines else ""
