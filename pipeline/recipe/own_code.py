"""Code of the user's own that a recipe is made of: a run remembers where it lies, and its commands
find it there again.

A launch writes `code.json` beside recipe.json or suite.json:

    {"mysnn": {"folder": "/home/me/lab", "files": {"mysnn/__init__.py": "90b2...", "mysnn/nets.py":
    "51aa..."}}}

The folder of a package joins the end of the path (`sys.path`) where the user trusts that package,
and never otherwise: a run's folder may come from somebody else. A package that the path already has
wins, as it does at the launch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.core.run_folder import RunFolder
from pipeline.recipe.json import is_inside, read_json, write_json

_said: set[tuple[str, ...]] = set()
"""notices of this process: worker and driver are one in an inline run, and one line is enough"""


@dataclass(frozen=True)
class Package:
    """What the user trusts by one name, as it was at a launch."""

    folder: str | None
    """that holds it, absolute; None: it is of this installation"""
    files: Mapping[str, str]
    """sha256 of each module that was imported, 16 hex digits, by its path in the folder"""


def needed(trust: Iterable[str], targets: Iterable[str]) -> tuple[str, ...]:
    """The trusted names that one of the `targets` (dotted names of parts) is inside of; each once,
    none inside of another.
    """
    of = tuple(targets)
    wanted = [
        name for name in dict.fromkeys(trust) if any(is_inside(target, [name]) for target in of)
    ]
    return tuple(
        name
        for name in wanted
        if not any(name != other and is_inside(name, [other]) for other in wanted)
    )


def note(trust: Iterable[str]) -> dict[str, Any]:
    """The JSON of `read`: the packages of these names as this process has imported them."""
    return {name: asdict(_imported(name)) for name in trust}


def write(folder: Path, trust: Iterable[str]) -> None:
    """Write code.json into the folder of a run or suite, unless nothing is trusted."""
    if found := note(trust):
        write_json(RunFolder(folder).code, found)


def read(folder: Path) -> dict[str, Package]:
    """The packages that a run or suite was launched with, by name.

    Raises:
        ValueError: code.json is damaged.
    """
    file = RunFolder(folder).code
    return packages(read_json(file), who=str(file)) if file.exists() else {}


def names(folder: Path) -> tuple[str, ...]:
    """Their names, for a command that is printed; none where code.json is damaged, which the
    command itself then says.
    """
    try:
        return tuple(read(folder))
    except (OSError, ValueError):
        return ()


def packages(value: Any, *, who: str) -> dict[str, Package]:
    """What `note` returned.

    Raises:
        ValueError: anything else; in the name of `who` it came from.
    """
    rule = f"{who}: must name the folder and the files of each package"
    if not isinstance(value, dict):
        raise ValueError(f"{rule}; got {value!r}")
    found = {}
    for name, about in value.items():
        folder, files = (
            (about.get("folder"), about.get("files")) if isinstance(about, dict) else (None, None)
        )
        is_name = all(part.isidentifier() for part in name.split("."))
        is_folder = folder is None or (isinstance(folder, str) and Path(folder).is_absolute())
        if (
            not is_name
            or not is_folder
            or not isinstance(files, dict)
            or not all(isinstance(h, str) for h in files.values())
        ):
            raise ValueError(f"{rule}; got {json.dumps({name: about})}")
        found[name] = Package(folder, files)
    return found


@contextmanager
def on_path(noted: Mapping[str, Package], trust: Collection[str], *, of: str) -> Iterator[None]:
    """Inside, what is trusted can be imported from where it was at the launch of `of`, a run or
    suite.

    Code that lies elsewhere now, or has changed, is told on stderr in one line and is no error: who
    mends their code goes on with a run as it is, as with another commit of spiketrain.

    Raises:
        ValueError: the code is neither there nor anywhere else on the path.
    """
    wanted = _trusted(noted, trust)
    for name, package in wanted.items():
        _reach(name, package)
    try:
        yield
    finally:
        for name, package in wanted.items():
            _tell_if_changed(name, package, of)


def digest(folder: Path, trust: Collection[str]) -> str:
    """12 hex digits of the trusted packages of a run as this process finds them, and not as they
    were at its launch.

    Raises:
        ValueError: code.json is damaged.
    """
    found = hashlib.sha256()
    for name, package in sorted(_trusted(read(folder), trust).items()):
        place = _place(name, package)
        for file in package.files:
            found.update(f"{file} {_digest(place / file)}\n".encode())
    return found.hexdigest()[:12]


def _trusted(noted: Mapping[str, Package], trust: Collection[str]) -> dict[str, Package]:
    """Those that do not come with the installation."""
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
    files = sorted(
        each for each in modules.values() if each.is_relative_to(folder) and each.is_file()
    )
    return Package(
        str(folder), {each.relative_to(folder).as_posix(): _digest(each) for each in files}
    )


def _reach(name: str, package: Package) -> None:
    folder, top = str(package.folder), name.partition(".")[0]
    if folder not in sys.path and Path(folder).exists():
        sys.path.append(folder)
        importlib.invalidate_caches()
    if not _places(top):
        raise ValueError(
            f"{top} must be in {folder}, where it was at the launch; it is not there: "
            "put it back, or name its new folder in PYTHONPATH"
        )


def _tell_if_changed(name: str, package: Package, of: str) -> None:
    top, was, now = name.partition(".")[0], Path(str(package.folder)), _place(name, package)
    changed = [file for file, digest in package.files.items() if _digest(now / file) != digest]
    told = (
        []
        if now.resolve() == was.resolve()
        else [f"{top} is in {now} now, and was in {was} when {of} was launched"]
    )
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        told.append(
            f"{changed[0]}{more} in {now} differs from when {of} was launched, and so may its"
            " results"
        )
    about = (top, str(was), str(now), *changed)
    if told and about not in _said:  # also by another run of the suite
        _said.add(about)
        print("; ".join(told), file=sys.stderr)


def _place(name: str, package: Package) -> Path:
    """The folder that a package is imported from now."""
    places = _places(name.partition(".")[0]) or [Path(str(package.folder))]
    return next(
        (place for place in places if any((place / file).is_file() for file in package.files)),
        places[0],
    )


def _places(top: str) -> list[Path]:
    """The folders where Python finds a package or module of this name; of a package without
    `__init__.py` several.
    """
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [Path(place).absolute().parent for place in spec.submodule_search_locations]
    return [Path(spec.origin).absolute().parent] if spec.origin is not None else []


def _digest(file: Path) -> str:
    """16 hex digits; none of a file that is not there."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else ""
