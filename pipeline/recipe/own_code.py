"""The user's own code that a recipe names: its location at launch, and its import later.

A launch writes `code.json` beside recipe.json or suite.json:

    {"mysnn": {"folder": "/home/me/lab",
               "files": {"mysnn/__init__.py": "90b2...", "mysnn/nets.py": "51aa..."}}}

A later command appends the folder of a package to `sys.path` only if the user trusts that package,
because a run's folder may come from somebody else. A package that is already on the path takes
precedence, as at the launch.
"""

import hashlib
import importlib.util
import json
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from pipeline.core.checks import require
from pipeline.core.run_folder import RunFolder
from pipeline.core.units import first_few
from pipeline.recipe.json import is_inside, read_json, write_json
from pipeline.recipe.spec import arguments_of

# Notices that this process has printed. In an inline run, worker and driver share one process and
# must not both print.
_printed: set[tuple[str, ...]] = set()


@dataclass(frozen=True)
class Package:
    """One trusted package, as it was at the launch."""

    # absolute path of the folder that contains the package; None: the package is part of this
    # installation, or was not imported
    folder: str | None
    # sha256 (16 hex digits) of each imported module, by the module's path in the folder
    files: Mapping[str, str]


def needed(trust: Iterable[str], targets: Collection[str]) -> tuple[str, ...]:
    """The trusted names that contain at least one target. A name inside another one is left out.

    Args:
        targets: dotted names of parts.
    """
    containing = {name: None for name in trust if any(is_inside(each, [name]) for each in targets)}
    return tuple(name for name in containing if not is_inside(name, containing.keys() - {name}))


def describe_packages(trust: Iterable[str]) -> dict[str, Any]:
    """The packages of these names as this process imported them, as JSON for `packages`."""
    return {name: asdict(_imported_package(name)) for name in trust}


def write(folder: Path, trust: Iterable[str]) -> None:
    """Write code.json into the folder of a run or suite.

    Without trusted names, no file is written.
    """
    if described := describe_packages(trust):
        write_json(RunFolder(folder).code, described)


def read(folder: Path) -> dict[str, Package]:
    """The packages that a run or suite was launched with, by name.

    Raises:
        ValueError: code.json is damaged.
    """
    file = RunFolder(folder).code
    return packages(read_json(file), subject=str(file)) if file.exists() else {}


def names(folder: Path) -> tuple[str, ...]:
    """The names of the packages, for a printed command; none if code.json is damaged."""
    try:
        return tuple(read(folder))
    except (OSError, ValueError):
        return ()


def packages(value: Any, *, subject: str) -> dict[str, Package]:
    """Parse the JSON that `describe_packages` returned.

    Args:
        subject: the source of the value, for the message.

    Raises:
        ValueError: the value has another form.
    """
    rule = f"{subject}: must name the folder and the files of each package"
    require(isinstance(value, dict), f"{rule}; got {value!r}")
    result = {}
    for name, fields in value.items():
        package = Package(**arguments_of(Package, fields, subject=f"{subject}: {name}"))
        require(
            all(part.isidentifier() for part in name.split("."))
            and (package.folder is None or Path(package.folder).is_absolute())
            and all(isinstance(each, str) for each in package.files.values()),
            f"{rule}; got {json.dumps({name: fields})}",
        )
        result[name] = package
    return result


@contextmanager
def importable(
    packages: Mapping[str, Package], trust: Collection[str], *, owner: str
) -> Iterator[None]:
    """Make trusted packages importable from the folders that they had at the launch.

    The folders are appended to `sys.path`, and stay there after the `with` block. At the end of the
    block, a package whose code has changed since the launch is reported in one line on stderr.

    Args:
        owner: the name of the run or suite, for the line.

    Raises:
        ValueError: a package is neither in its folder nor elsewhere on the path.
    """
    trusted = _trusted(packages, trust)
    for name, package in trusted.items():
        folder = str(package.folder)
        if folder not in sys.path and Path(folder).exists():
            sys.path.append(folder)
            importlib.invalidate_caches()
        require(
            _import_folders(name),
            f"{name} must be in {folder}, where it was at the launch; it is not there: put it back,"
            " or name its new folder in PYTHONPATH",
        )
    try:
        yield
    finally:
        for name, package in trusted.items():
            _print_if_changed(name, package, owner)


def digest(folder: Path, trust: Collection[str]) -> str:
    """A digest (12 hex digits) of the current files of a run's trusted packages.

    Raises:
        ValueError: code.json is damaged.
    """
    hasher = hashlib.sha256()
    for name, package in sorted(_trusted(read(folder), trust).items()):
        current_folder = _current_folder(name, package)
        for file in package.files:
            hasher.update(f"{file} {_digest(current_folder / file)}\n".encode())
    return hasher.hexdigest()[:12]


def _trusted(packages: Mapping[str, Package], trust: Collection[str]) -> dict[str, Package]:
    """The packages that the user trusts, without those that have no folder."""
    return {
        name: package
        for name, package in packages.items()
        if package.folder is not None
        and (is_inside(name, trust) or any(is_inside(each, [name]) for each in trust))
    }


def _imported_package(name: str) -> Package:
    modules = {
        module_name: Path(file).absolute()
        for module_name, module in list(sys.modules.items())
        if (is_inside(module_name, [name]) or is_inside(name, [module_name]))
        and (file := getattr(module, "__file__", None))
    }
    if not modules or name.partition(".")[0] == __name__.partition(".")[0]:
        return Package(None, {})
    module_name, file = next(iter(modules.items()))
    # one level up for each dot of the name, and one more for a package
    folder = file.parents[module_name.count(".") + int(file.stem == "__init__")]
    if any(
        folder.is_relative_to(sysconfig.get_path(kind))
        for kind in ("stdlib", "platstdlib", "purelib", "platlib")
    ):
        return Package(None, {})
    files = {
        file.relative_to(folder).as_posix(): _digest(file)
        for file in sorted(modules.values())
        if file.is_relative_to(folder) and file.is_file()
    }
    return Package(str(folder), files)


def _print_if_changed(name: str, package: Package, owner: str) -> None:
    folder = _current_folder(name, package)
    changed = [
        file for file, file_digest in package.files.items() if _digest(folder / file) != file_digest
    ]
    notice = (str(folder), *changed)
    if changed and notice not in _printed:  # another run of the suite may have printed the notice
        _printed.add(notice)
        print(
            f"{first_few(changed, max_names=1)} in {folder} changed after {owner} was launched, so"
            " results may differ",
            file=sys.stderr,
        )


def _current_folder(name: str, package: Package) -> Path:
    """The folder from which Python would import a package now."""
    folders = _import_folders(name) or [Path(str(package.folder))]
    return next(
        (each for each in folders if any((each / file).is_file() for file in package.files)),
        folders[0],
    )


def _import_folders(name: str) -> list[Path]:
    """The folders that contain the top-level package of a name; several for a namespace package."""
    spec = find_spec(name.partition(".")[0])
    files = () if spec is None else spec.submodule_search_locations or (spec.origin,)
    return [Path(file).absolute().parent for file in files if file is not None]


def find_spec(name: str) -> ModuleSpec | None:
    """The spec by which Python would import a module now; None if it cannot."""
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def _digest(file: Path) -> str:
    """The sha256 of a file (16 hex digits); an empty string if there is no file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else ""
