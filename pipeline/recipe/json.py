"""Recipes as JSON.

A part becomes `{"target": name, "kwargs": ...}`. A frozen dataclass becomes
`{"value": name, "kwargs": ...}`.

Names are dotted. Reading a recipe imports the names, so only trusted names are accepted.
"""

import dataclasses
import importlib
import inspect
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.core.checks import require
from pipeline.core.files import FOR_THE_USER, write_whole
from pipeline.core.run_folder import RunFolder
from pipeline.recipe.spec import Spec, is_path

RECIPE_FILE = RunFolder("").recipe.name


def encode(value: Any, *, paths: bool) -> Any:
    """The JSON form of a field.

    Args:
        paths: False leaves out keywords that are paths.

    Raises:
        ValueError: the value has no JSON form, or a callable cannot be imported again.
    """
    if isinstance(value, Spec):
        kwargs = {
            key: encode(item, paths=paths)
            for key, item in value.kwargs.items()
            if paths or not is_path(value.target, key)
        }
        return {"target": dotted(value.target), "kwargs": kwargs}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [encode(item, paths=paths) for item in value]
    if isinstance(value, Mapping):
        return {str(key): encode(item, paths=paths) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kwargs = {
            each.name: encode(getattr(value, each.name), paths=paths)
            for each in dataclasses.fields(value)
            if each.init
        }
        return {"value": dotted(type(value)), "kwargs": kwargs}
    raise ValueError(
        f"recipe: {value!r} cannot be written to recipe.json; use numbers, text, lists or spec(...)"
    )


def decode(value: Any, trusted: Collection[str]) -> Any:
    """Reverse `encode`. Lists become tuples, and paths stay text. Only trusted names are imported.

    Raises:
        ValueError: a target is not trusted or does not exist, or the JSON is damaged.
    """
    if isinstance(value, list):
        return tuple(decode(item, trusted) for item in value)
    if not isinstance(value, Mapping):
        return value
    kind = _kind(value)
    if kind is None:
        return {key: decode(item, trusted) for key, item in value.items()}
    target = imported(value[kind], trusted)
    kwargs = value["kwargs"]
    require(isinstance(kwargs, Mapping), f"recipe.json: kwargs must be an object; got {kwargs!r}")
    kwargs = {key: decode(item, trusted) for key, item in kwargs.items()}
    if kind == "target":
        return Spec(target, kwargs)
    # The object is constructed here, so it must be a dataclass.
    require(
        isinstance(target, type) and dataclasses.is_dataclass(target),
        f"recipe.json: the value {value[kind]} must be a dataclass; it is not",
    )
    try:
        return target(**kwargs)
    except TypeError as error:
        raise ValueError(f"recipe.json: {value[kind]}: {error}") from error


def _kind(encoded: Any) -> str | None:
    """`target` for the JSON of a part, `value` for a frozen dataclass, None for other JSON."""
    kinds = ("target", "value") if isinstance(encoded, Mapping) else ()
    return next((kind for kind in kinds if encoded.keys() == {kind, "kwargs"}), None)


def walk(encoded: Any) -> Iterator[Any]:
    """A JSON value and all values inside it."""
    yield encoded
    inner = encoded.values() if isinstance(encoded, Mapping) else encoded
    for item in inner if isinstance(encoded, (Mapping, list)) else ():
        yield from walk(item)


def targets(encoded: Any) -> list[str]:
    """The dotted names of all parts and frozen dataclasses in a recipe's JSON."""
    return [each[kind] for each in walk(encoded) if (kind := _kind(each)) is not None]


def flat(encoded: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and short text of an encoded value, for a table of parameters."""
    if (kind := _kind(encoded)) is not None:
        yield prefix, encoded[kind]
        encoded = encoded["kwargs"]
    if isinstance(encoded, Mapping):
        for key, item in encoded.items():
            yield from flat(item, f"{prefix}.{key}" if prefix else key)
    elif isinstance(encoded, list) and any(isinstance(item, Mapping) for item in encoded):
        for index, item in enumerate(encoded):
            yield from flat(item, f"{prefix}.{index}")
    else:
        yield prefix, encoded if isinstance(encoded, str) else json.dumps(encoded)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file does not exist, cannot be read, or is not JSON; the message names it.
        OSError: the storage fails.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: must be a JSON file; it does not exist") from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in FOR_THE_USER:
            raise
        raise ValueError(f"{path}: must be a JSON file; got {error}") from error


def recipe_fields(run: Path) -> dict[str, Any]:
    """The fields in the recipe.json of a run, as JSON. No code is imported.

    Raises:
        ValueError: the file does not exist, or contains no recipe.
        OSError: the storage fails.
    """
    file = RunFolder(run).recipe
    written = read_json(file)
    recipe: Any = written.get("recipe") if isinstance(written, dict) else None
    require(isinstance(recipe, dict), f"{file}: must hold a recipe; got {written!r}")
    return recipe


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically and flush it to the disk."""
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def check_format(value: Any, version: int, *, subject: str) -> None:
    """Refuse JSON of another format version.

    Raises:
        ValueError: the value is not an object, or has another version.
    """
    got = value.get("version") if isinstance(value, Mapping) else value
    require(
        isinstance(value, Mapping) and got == version,
        f"{subject}: this spiketrain reads format version {version}; got {got!r}",
    )


def dotted(target: Callable[..., Any]) -> str:
    """The dotted name of a callable, which `imported` accepts.

    Raises:
        ValueError: the callable is a lambda, or is defined inside a function.
    """
    name = f"{target.__module__}.{target.__qualname__}"
    require(
        "<" not in name,
        f"recipe: {name} has no importable name; define it at the top level of a module",
    )
    return name


def imported(
    name: Any, trusted: Collection[str], *, subject: str = RECIPE_FILE
) -> Callable[..., Any]:
    """The callable of a dotted name.

    Args:
        subject: the source of the name, for the message.

    Raises:
        ValueError: the name is not trusted, does not exist, or is neither a class nor a class
            method nor a function of a module.
        ModuleNotFoundError: the module imports another one that does not exist.
    """
    require(isinstance(name, str), f"{subject}: a dotted name must be text; got {name!r}")
    not_trusted = f"{subject}: {name} is not in a trusted package; name its package with --trust"
    require(is_trusted(name, trusted), not_trusted)
    not_found = f"{subject}: {name} does not exist in this installation"
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:cut])
        try:
            target: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # the module exists; a module that it imports does not
            continue
        for part in parts[cut:]:
            require(hasattr(target, part), not_found)
            target = getattr(target, part)
        # `pipeline.data.datasets.beton.Path.unlink` begins with a trusted name. The module that
        # defines the object must be trusted, too.
        defined_name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
        require(callable(target) and is_trusted(defined_name, trusted), not_trusted)
        # A method of an instance is refused, because a recipe could pass any object as `self`.
        owner = getattr(target, "__self__", None) if inspect.ismethod(target) else target
        require(
            isinstance(owner, type)
            or getattr(owner, "__qualname__", "") == getattr(owner, "__name__", None),
            f"{subject}: {name} must be a class, a class method or a function of a module; it is"
            " none of them",
        )
        return target
    raise ValueError(not_found)


def is_inside(name: str, trusted: Collection[str]) -> bool:
    """Whether a dotted name equals one of the names, or is inside one of them."""
    return any(name == each or name.startswith(f"{each}.") for each in trusted)


def is_trusted(name: str, trusted: Collection[str]) -> bool:
    """Whether a dotted name may be imported.

    The longest entry that equals or contains the name decides. An entry that begins with `!`
    refuses the name. For example, "!pipeline.models.teachers" refuses a part of "pipeline.models".
    """
    entries = [each for each in trusted if is_inside(name, [each.removeprefix("!")])]
    if not entries:
        return False
    longest = max(entries, key=lambda each: (len(each.removeprefix("!")), each[0] != "!"))
    return not longest.startswith("!")


def differing(name: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    """The leaves in which two JSON values differ: name, value in a, value in b.

    Names are keys of `--set`, or `KEY[INDEX]` for an item of a list.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        kind = _kind(a)
        if kind is not None and kind == _kind(b) and a[kind] != b[kind]:
            yield name, a[kind], b[kind]
            return  # the keywords of two different functions cannot be compared
        prefix = f"{name}." if name else ""
        for key in dict.fromkeys([*a, *b]):
            inner = name if key == "kwargs" else prefix + key
            yield from differing(inner, a.get(key, "(absent)"), b.get(key, "(absent)"))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (first, second) in enumerate(zip(a, b, strict=True)):
            yield from differing(f"{name}[{index}]", first, second)
    elif a != b:
        yield name, a, b


def listed(differences: list[tuple[str, Any, Any]]) -> str:
    """The first six differences as text, and the number of further ones."""
    texts = [f"{name}: {json.dumps(a)} and {json.dumps(b)}" for name, a, b in differences[:6]]
    if len(differences) > 6:
        texts.append(f"and {len(differences) - 6} more")
    return "; ".join(texts)
