"""The user's own code that a recipe names: its location at launch, and its import later.

A launch writes `code.json` beside recipe.json or suite.json: the folder of each package.

    {"mysnn": "/home/me/lab"}

A later command appends the folder of a package to `sys.path` only if the user trusts that package,
because a run's folder may come from somebody else. A package that is already on the path takes
precedence, as at the launch.
"""

import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from pipeline.core.checks import require
from pipeline.core.run_folder import RunFolder
from pipeline.recipe.json import is_inside, read_json, write_json

# By name of a package: the absolute path of the folder that contains it. None: the package is part
# of this installation, or was not imported.
Folders = Mapping[str, str | None]


def needed(trust: Iterable[str], targets: Collection[str]) -> tuple[str, ...]:
    """The trusted names that contain at least one target. A name inside another one is left out.

    Args:
        targets: dotted names of parts.
    """
    containing = {name: None for name in trust if any(is_inside(each, [name]) for each in targets)}
    return tuple(name for name in containing if not is_inside(name, containing.keys() - {name}))


def folders_of(trust: Iterable[str]) -> dict[str, str | None]:
    """The folders of the packages of these names, as this process imported them."""
    return {name: _imported_folder(name) for name in trust}


def write(folder: Path, trust: Iterable[str]) -> None:
    """Write code.json into the folder of a run or suite.

    Without trusted names, no file is written.
    """
    if folders := folders_of(trust):
        write_json(RunFolder(folder).code, folders)


def read(folder: Path) -> Folders:
    """The packages that a run or suite was launched with.

    Raises:
        ValueError: code.json is damaged.
    """
    file = RunFolder(folder).code
    return checked(read_json(file), subject=str(file)) if file.exists() else {}


def names(folder: Path) -> tuple[str, ...]:
    """The names of the packages, for a printed command; none if code.json is damaged."""
    try:
        return tuple(read(folder))
    except (OSError, ValueError):
        return ()


def checked(value: Any, *, subject: str) -> Folders:
    """The value, if it has the form of `folders_of`.

    Args:
        subject: the source of the value, for the message.

    Raises:
        ValueError: the value has another form.
    """
    require(
        isinstance(value, dict)
        and all(part.isidentifier() for name in value for part in name.split("."))
        and all(
            folder is None or (isinstance(folder, str) and Path(folder).is_absolute())
            for folder in value.values()
        ),
        f"{subject}: must name the folder of each package; got {value!r}",
    )
    return value


def make_importable(folders: Folders, trust: Collection[str]) -> None:
    """Append the folders of trusted packages to `sys.path`.

    Raises:
        ValueError: a package is neither in its folder nor elsewhere on the path.
    """
    for name, folder in folders.items():
        if folder is None or not any(_overlap(name, each) for each in trust):
            continue
        if folder not in sys.path and Path(folder).exists():
            sys.path.append(folder)
            importlib.invalidate_caches()
        require(
            find_spec(name.partition(".")[0]),
            f"{name} must be in {folder}, where it was at the launch; it is not there: put it back,"
            " or name its new folder in PYTHONPATH",
        )


def digest(trust: Collection[str]) -> str:
    """A digest (12 hex digits) of the modules of trusted packages that this process imported."""
    hasher = hashlib.sha256()
    for name, file in sorted(_imported_modules(trust)):
        hasher.update(f"{name} ".encode() + file.read_bytes())
    return hasher.hexdigest()[:12]


def _overlap(a: str, b: str) -> bool:
    """Whether one of two dotted names contains the other."""
    return is_inside(a, [b]) or is_inside(b, [a])


def _imported_modules(trust: Collection[str]) -> Iterator[tuple[str, Path]]:
    """The name and the file of each imported module of trusted packages."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and any(_overlap(name, each) for each in trust):
            yield name, Path(file).absolute()


def _imported_folder(name: str) -> str | None:
    module_name, file = next(_imported_modules([name]), ("", Path()))
    if not module_name or name.partition(".")[0] == __name__.partition(".")[0]:
        return None
    # one level up for each dot of the name, and one more for a package
    folder = file.parents[module_name.count(".") + int(file.stem == "__init__")]
    is_installed = any(
        folder.is_relative_to(sysconfig.get_path(kind))
        for kind in ("stdlib", "platstdlib", "purelib", "platlib")
    )
    return None if is_installed else str(folder)


def find_spec(name: str) -> ModuleSpec | None:
    """The spec by which Python would import a module now; None if it cannot."""
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
