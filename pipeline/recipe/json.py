"""What a recipe is made of as JSON, and back: a part is `{"target": name, "kwargs": ...}`, a frozen
value `{"value": name, ...}`.

Names are dotted paths. Reading imports what they name, and so admits alone what is trusted:
packages, modules, single callables."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.core.files import FOR_THE_USER, write_whole
from pipeline.core.run_folder import RunFolder
from pipeline.recipe.spec import Spec, is_path

_ABSENT = "(absent)"
_RECIPE = RunFolder("").recipe.name


def encode(value: Any, *, paths: bool) -> Any:
    """The JSON form of a field; without `paths`, keywords that say where something lies are left
    out.

    Raises:
        ValueError: a value that has no JSON form, or a callable that cannot be imported again.
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
    """The field that `encode` wrote; what is inside of a `trusted` name may be imported.

    Raises:
        ValueError: a target that is not trusted, or one that does not exist.
    """
    if isinstance(value, Mapping) and set(value) == {"target", "kwargs"}:
        return Spec(imported(value["target"], trusted), _keywords(value["kwargs"], trusted))
    if isinstance(value, Mapping) and set(value) == {"value", "kwargs"}:
        return _frozen_value(value["value"], _keywords(value["kwargs"], trusted), trusted)
    if isinstance(value, Mapping):
        return {key: decode(item, trusted) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(decode(item, trusted) for item in value)
    return value


def targets(encoded: Any) -> Iterator[str]:
    """The dotted names of all parts and frozen values in a recipe's JSON: what reading it
    imports.
    """
    for kind in ("target", "value"):
        if isinstance(encoded, Mapping) and set(encoded) == {kind, "kwargs"}:
            yield encoded[kind]
    for item in (
        encoded.values()
        if isinstance(encoded, Mapping)
        else encoded
        if isinstance(encoded, list)
        else ()
    ):
        yield from targets(item)


def flat(encoded: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and short text of an encoded value, for a table of parameters."""
    for kind in ("target", "value"):
        if isinstance(encoded, Mapping) and set(encoded) == {kind, "kwargs"}:
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
        ValueError: it is not there, may not be read, or holds something else; the message names it.
        OSError: its storage fails, for no fault of the user's.
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
    """The recipe in a run's folder, field by field as it is written; nothing is imported.

    Raises:
        ValueError: there is none.
        OSError: see `read_json`.
    """
    file = RunFolder(run).recipe
    written = read_json(file)
    recipe = written.get("recipe") if isinstance(written, dict) else None
    if not isinstance(recipe, dict):
        raise ValueError(f"{file}: must hold a recipe; got {written!r}")
    return recipe


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all, and through to the disk."""
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def dotted(target: Callable[..., Any]) -> str:
    """The name under which `imported` finds a callable again.

    Raises:
        ValueError: one that has none: a lambda, or what was defined inside a function.
    """
    name = f"{target.__module__}.{target.__qualname__}"
    if "<" in name:
        raise ValueError(
            f"recipe: {name} has no importable name; define it at the top level of a module"
        )
    return name


def imported(name: Any, trusted: Collection[str], *, who: str = _RECIPE) -> Callable[..., Any]:
    """The callable of a dotted name.

    Raises:
        ValueError: one that is not trusted, makes no parts, or does not exist; in the name of `who`
        asks.
    """
    if not isinstance(name, str):
        raise ValueError(f"{who}: what is imported is named by text; got {name!r}")
    refusal = (
        f"{who}: {name} is not in a trusted package; trusted are {', '.join(trusted)}; name its"
        " package with --trust"
    )
    if not is_inside(name, trusted):
        raise ValueError(refusal)
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:cut])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise  # the module is there; something that it needs is not
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                raise ValueError(f"{who}: {name} does not exist in this installation")
            found = getattr(found, part)
        # `pipeline.models.teachers.cache.os.system` begins with a trusted name: what counts is
        # where the
        # object was defined.
        defined = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
        if not callable(found) or not is_inside(defined, trusted):
            raise ValueError(refusal)
        if not _makes_parts(found):
            raise ValueError(
                f"{who}: {name} must be a class, a class method or a function of a module; it is"
                " none of them"
            )
        return found
    raise ValueError(f"{who}: {name} does not exist in this installation")


def _makes_parts(found: Any) -> bool:
    """A method does not, which whoever writes recipe.json could hand an object of their own as
    `self`.
    """
    if inspect.ismethod(found):
        return isinstance(found.__self__, type)
    return isinstance(found, type) or getattr(found, "__qualname__", "") == getattr(
        found, "__name__", None
    )


def _frozen_value(name: str, kwargs: dict[str, Any], trusted: Collection[str]) -> Any:
    """Such as Triangle(): made while the recipe is read, so it must be a dataclass and nothing
    else.
    """
    made = imported(name, trusted)
    if not (isinstance(made, type) and dataclasses.is_dataclass(made)):
        raise ValueError(f"recipe.json: {name} must be a dataclass to be a value; it is not")
    return made(**kwargs)


def _keywords(value: Any, trusted: Collection[str]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"recipe.json: kwargs must be an object; got {value!r}")
    return {key: decode(item, trusted) for key, item in value.items()}


def is_inside(name: str, trusted: Collection[str]) -> bool:
    """Whether a dotted name is one of the trusted, or in a package or module that is."""
    return any(name == each or name.startswith(f"{each}.") for each in trusted)


def differing(name: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    """The leaves that differ; a part's keywords are named `optimizer.lr`, as on the command
    line.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        for kind in ("target", "value"):  # a Spec, a frozen value
            if set(a) == set(b) == {kind, "kwargs"} and a[kind] != b[kind]:
                yield name, a[kind], b[kind]
                return  # two functions' keywords have nothing to do with each other
        for key in dict.fromkeys([*a, *b]):
            inner = name if key == "kwargs" else f"{name}.{key}" if name else key
            yield from differing(inner, a.get(key, _ABSENT), b.get(key, _ABSENT))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (first, second) in enumerate(zip(a, b, strict=True)):
            yield from differing(f"{name}[{index}]", first, second)
    elif a != b:
        yield name, a, b


def listed(found: list[tuple[str, Any, Any]]) -> str:
    """What `differing` found, as a sentence has it: the first six, and how many more there are."""
    shown = "; ".join(f"{name}: {json.dumps(a)} and {json.dumps(b)}" for name, a, b in found[:6])
    return shown + (f"; and {len(found) - 6} more" if len(found) > 6 else "")
