"""A buildable part of a recipe: a callable with keywords, checked against its signature when
written.
"""

import dataclasses
import inspect
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.core.checks import require


@dataclass(frozen=True)
class Spec:
    """A callable and its keywords, checked against its signature when written and called by
    `build`.
    """

    target: Callable[..., Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kwargs = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in self.kwargs.items()
        }
        require(callable(self.target), f"spec: the target must be callable; got {self.target!r}")
        parameters = inspect.signature(self.target).parameters.values()
        open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
        accepted, hints = _accepted(self.target), _hints(self.target)
        who = getattr(self.target, "__name__", "")
        for key, value in kwargs.items():
            require(
                key in accepted or open_ended,
                f"{who}: unexpected keyword {key!r}; it accepts {', '.join(accepted) or 'none'}",
            )
            if key in accepted and key in hints and not admits(hints[key], value):
                raise ValueError(
                    f"{who}: {key} must be {type_name(hints[key])}; got {_shown(value)}"
                )
        object.__setattr__(self, "kwargs", types.MappingProxyType(kwargs))

    def build(self, *args: Any, **more: Any) -> Any:
        """Call the target. Nested specs are built first.

        Args:
            args, more: further arguments that only the running process knows.

        Raises:
            ValueError: an argument is missing.
        """
        kwargs = {
            key: value.build() if isinstance(value, Spec) else value
            for key, value in self.kwargs.items()
        } | more
        try:
            inspect.signature(self.target).bind(*args, **kwargs)
        except TypeError as error:
            raise ValueError(
                f"{self.target.__name__}: {error}; it accepts {accepted_text(self.target)}"
            ) from error
        return self.target(*args, **kwargs)

    def with_(self, **changes: Any) -> "Spec":
        """The same part with some keywords changed."""
        return Spec(self.target, {**self.kwargs, **changes})

    @property
    def label(self) -> str:
        """The target's name with the written keywords: `SLTT(k=1)`."""
        written = (f"{key}={_shown(value)}" for key, value in self.kwargs.items())
        return f"{self.target.__name__}({', '.join(written)})"

    def __reduce__(self) -> tuple[Any, ...]:  # a mappingproxy does not pickle
        return Spec, (self.target, dict(self.kwargs))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Spec)
            and self.target is other.target
            and dict(self.kwargs) == dict(other.kwargs)
        )

    def __hash__(self) -> int:
        return hash((self.target, tuple(self.kwargs)))


def spec(target: Callable[..., Any], /, **kwargs: Any) -> Spec:
    """Write a buildable part of a recipe: `rule=spec(SLTT, k=1)`.

    Raises:
        ValueError: an unknown keyword, or a value that its annotation does not admit.
    """
    return Spec(target, kwargs)


def is_path(target: Callable[..., Any], key: str) -> bool:
    """Whether a keyword is annotated as a path."""
    hint = _hints(target).get(key)
    return any(arm is Path or arm is os.PathLike for arm in (hint, *typing.get_args(hint)))


def reference_to(name: str) -> str:
    """`@NAME`, a reference to the trained weights of recipe NAME in the same suite."""
    return f"@{name}"


def referred(path: str | os.PathLike[str]) -> str | None:
    """The NAME of a reference `@NAME`; None for any other path."""
    text = os.fspath(path)
    return text[1:] if text.startswith("@") else None


def _accepted(target: Callable[..., Any]) -> list[str]:
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        name for name, each in inspect.signature(target).parameters.items() if each.kind in by_name
    ]


def accepted_text(target: Callable[..., Any], prefix: str = "") -> str:
    return ", ".join(prefix + name for name in _accepted(target)) or "none"


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):
        return {}  # only a type checker can resolve the annotation, so it is not checked here


def arguments_of(
    cls: type, value: Any, *, who: str, besides: Collection[str] = ()
) -> dict[str, Any]:
    """The fields of a dataclass of plain values, from JSON.

    Args:
        who: where the value comes from, for the message.
        besides: fields that the caller gives.

    Raises:
        ValueError: the value is not an object, or a field is missing, unknown or of another type.
    """
    require(isinstance(value, Mapping), f"{who}: must be an object; got {value!r}")
    hints = typing.get_type_hints(cls)
    known = {each.name: each for each in dataclasses.fields(cls) if each.name not in besides}
    for name, given in value.items():
        require(
            name in known,
            f"{who}: unknown field {name!r}; it has {', '.join(known)}",
        )
        require(
            admits(hints[name], given),
            f"{who}: {name} must be {type_name(hints[name])}; got {given!r}",
        )
    needed = [name for name, each in known.items() if each.default is dataclasses.MISSING]
    missing = [name for name in needed if name not in value]
    require(not missing, f"{who}: needs {', '.join(needed)}; there is no {', '.join(missing)}")
    return dict(value)


def admits(hint: Any, value: Any) -> bool:
    """Whether a value fits an annotation. A Spec fits wherever a built object is expected."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(admits(arm, value) for arm in args)
    if origin is Literal:
        return any(value == arm and type(value) is type(arm) for arm in args)
    if origin is typing.Annotated:
        return admits(args[0], value)
    plain = type(None) if hint is None else origin or hint
    if hint is Any or not inspect.isclass(plain):
        return True
    if plain in (bool, int, float, str):
        accepted = (int, float) if plain is float else plain
        return isinstance(value, accepted) and (plain is bool or not isinstance(value, bool))
    if plain is Path or plain is os.PathLike:
        return isinstance(value, (str, os.PathLike))
    if plain in (tuple, list) and isinstance(value, (list, tuple)):
        # A list is kept as a tuple, because recipes are frozen.
        if not args or plain is list or args[1:] == (Ellipsis,):
            return all(admits(args[0] if args else Any, item) for item in value)
        return len(args) == len(value) and all(map(admits, args, value))
    if isinstance(value, Spec) and plain not in (list, dict, tuple, type(None)):
        return True
    try:
        return isinstance(value, plain)
    except TypeError:  # a Protocol that is not runtime-checkable
        return True


def type_name(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(type_name, args))
    if origin is None and inspect.isclass(hint):
        return "None" if hint is type(None) else hint.__name__
    return str(hint).replace("typing.", "")


def _shown(value: Any) -> str:
    return value.label if isinstance(value, Spec) else repr(value)
