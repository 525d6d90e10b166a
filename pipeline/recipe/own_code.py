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
    """One trusted name, as it was at the launch."""

    folder: str | None  # absolute folder that holds it; None: part of this installation
    # sha256 (16 hex digits) of each imported module, by the module's path in the folder
    files: Mapping[str, str]


def needed(trust: Iterable[str], targets: Collection[str]) -> tuple[str, ...]:
    """The trusted names that contain one of the `targets`. A name inside another is left out.

    Args:
        targets: dotted names of parts.
    """
    wanted = {name: None for name in trust if any(is_inside(each, [name]) for each in targets)}
    return tuple(name for name in wanted if not is_inside(name, wanted.keys() - {name}))


def note(trust: Iterable[str]) -> dict[str, Any]:
    """The packages of these names as this process imported them, as JSON for `packages`."""
    return {name: asdict(_imported(name)) for name in trust}


def write(folder: Path, trust: Iterable[str]) -> None:
    """Write code.json into the folder of a run or suite.

    Nothing is written if nothing is trusted.
    """
    if noted := note(trust):
        write_json(RunFolder(folder).code, noted)


def read(folder: Path) -> dict[str, Package]:
    """The packages that a run or suite was launched with, by name.

    Raises:
        ValueError: code.json is damaged.
    """
    file = RunFolder(folder).code
    return packages(read_json(file), who=str(file)) if file.exists() else {}


def names(folder: Path) -> tuple[str, ...]:
    """The names of the packages, for a printed command; none if code.json is damaged."""
    try:
        return tuple(read(folder))
    except (OSError, ValueError):
        return ()


def packages(value: Any, *, who: str) -> dict[str, Package]:
    """Read what `note` returned.

    Args:
        who: where the value comes from, for the message.

    Raises:
        ValueError: the value has another form.
    """
    rule = f"{who}: must name the folder and the files of each package"
    require(isinstance(value, dict), f"{rule}; got {value!r}")
    result = {}
    for name, fields in value.items():
        package = Package(**arguments_of(Package, fields, who=f"{who}: {name}"))
        require(
            all(part.isidentifier() for part in name.split("."))
            and (package.folder is None or Path(package.folder).is_absolute())
            and all(isinstance(digest, str) for digest in package.files.values()),
            f"{rule}; got {json.dumps({name: fields})}",
        )
        result[name] = package
    return result


@contextmanager
def on_path(noted: Mapping[str, Package], trust: Collection[str], *, of: str) -> Iterator[None]:
    """Make trusted packages importable from their folders at launch, inside a `with` block.

    If the code has changed, one line on stderr reports it, and the command goes on.

    Args:
        of: the name of the run or suite, for the messages.

    Raises:
        ValueError: a package is neither in its folder nor elsewhere on the path.
    """
    wanted = _trusted(noted, trust)
    for name, package in wanted.items():
        folder, top = str(package.folder), name.partition(".")[0]
        if folder not in sys.path and Path(folder).exists():
            sys.path.append(folder)
            importlib.invalidate_caches()
        require(
            _places(top),
            f"{top} must be in {folder}, where it was at the launch; it is not there: put it back,"
            " or name its new folder in PYTHONPATH",
        )
    try:
        yield
    finally:
        for name, package in wanted.items():
            _print_if_changed(name, package, of)


def digest(folder: Path, trust: Collection[str]) -> str:
    """A digest (12 hex digits) of the current files of a run's trusted packages.

    Raises:
        ValueError: code.json is damaged.
    """
    hasher = hashlib.sha256()
    for name, package in sorted(_trusted(read(folder), trust).items()):
        place = _place(name, package)
        for file in package.files:
            hasher.update(f"{file} {_digest(place / file)}\n".encode())
    return hasher.hexdigest()[:12]


def _trusted(noted: Mapping[str, Package], trust: Collection[str]) -> dict[str, Package]:
    """The trusted packages that are not part of the installation."""
    return {
        name: package
        for name, package in noted.items()
        if package.folder is not None
        and (is_inside(name, trust) or any(is_inside(each, [name]) for each in trust))
    }


def _imported(name: str) -> Package:
    modules = {
        each: Path(file).absolute()
        for each, module in list(sys.modules.items())
        if (is_inside(each, [name]) or is_inside(name, [each]))
        and (file := getattr(module, "__file__", None))
    }
    if not modules or name.partition(".")[0] == __name__.partition(".")[0]:
        return Package(None, {})
    first, file = next(iter(modules.items()))
    folder = file.parents[first.count(".") + (file.stem == "__init__")]
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
    folder = _place(name, package)
    changed = [file for file, digest in package.files.items() if _digest(folder / file) != digest]
    notice = (str(folder), *changed)
    if changed and notice not in _printed:  # another run of the suite may have printed it
        _printed.add(notice)
        print(
            f"{first_few(changed, max_names=1)} in {folder} changed after {owner} was launched, so"
            " results may differ",
            file=sys.stderr,
        )


def _place(name: str, package: Package) -> Path:
    """The folder from which Python would import a package now."""
    places = _places(name.partition(".")[0]) or [Path(str(package.folder))]
    return next(
        (place for place in places if any((place / file).is_file() for file in package.files)),
        places[0],
    )


def _places(top: str) -> list[Path]:
    """The folders where Python finds a top-level package. A namespace package may have several."""
    spec = find_spec(top)
    files = () if spec is None else spec.submodule_search_locations or (spec.origin,)
    return [Path(file).absolute().parent for file in files if file is not None]


def find_spec(name: str) -> ModuleSpec | None:
    """The place from which Python would import a module now; None if it cannot."""
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def _digest(file: Path) -> str:
    """The sha256 of a file (16 hex digits); an empty string if there is no file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else ""
