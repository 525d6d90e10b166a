"""A buildable part of a recipe: a callable with keywords that its signature accepts."""

import dataclasses
import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.core.checks import require

# The launch of a suite of recipes looks both up thousands of times.
_signature = functools.lru_cache(512)(inspect.signature)
type_hints = functools.lru_cache(512)(typing.get_type_hints)


@dataclass(frozen=True)
class Spec:
    """A callable, `target`, and its keywords, `kwargs`. They are checked at once; `build` calls.

    Raises: ValueError as `spec`.
    """

    target: Callable[..., Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        kwargs = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in self.kwargs.items()
        }
        require(callable(self.target), f"spec: the target must be callable; got {self.target!r}")
        parameters = _signature(self.target).parameters.values()
        accepts_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
        accepted, hints = _keywords(self.target), _hints(self.target)
        subject = getattr(self.target, "__name__", "")
        for key, value in kwargs.items():
            require(
                key in accepted or accepts_any,
                f"{subject}: unexpected keyword {key!r}; it accepts"
                f" {', '.join(accepted) or 'none'}",
            )
            if key in accepted and key in hints and not admits(hints[key], value):
                raise ValueError(
                    f"{subject}: {key} must be {type_name(hints[key])}; got {_format_value(value)}"
                )
        object.__setattr__(self, "kwargs", types.MappingProxyType(kwargs))

    def build(self, *args: Any, **runtime_kwargs: Any) -> Any:
        """Call the target. Keywords that are specs are built first. Specs inside a tuple are not,
        nor is a keyword that the target annotates as `Spec`.

        Args:
            args, runtime_kwargs: further arguments that only the running process knows.

        Raises:
            ValueError: the target does not accept these arguments.
        """
        hints = _hints(self.target)
        kwargs = {
            key: value.build() if isinstance(value, Spec) and hints.get(key) is not Spec else value
            for key, value in self.kwargs.items()
        } | runtime_kwargs
        try:
            _signature(self.target).bind(*args, **kwargs)
        except TypeError as error:
            raise ValueError(
                f"{self.target.__name__}: {error}; it accepts {keywords_text(self.target)}"
            ) from error
        return self.target(*args, **kwargs)

    def with_(self, **changes: Any) -> "Spec":
        """The same part with some keywords changed."""
        return Spec(self.target, {**self.kwargs, **changes})

    @property
    def label(self) -> str:
        """The target's name with its keywords: `SLTT(k=1)`."""
        keywords = (f"{key}={_format_value(value)}" for key, value in self.kwargs.items())
        return f"{self.target.__name__}({', '.join(keywords)})"

    def __reduce__(self) -> tuple[Any, ...]:  # a mappingproxy does not pickle
        return Spec, (self.target, dict(self.kwargs))


def spec(target: Callable[..., Any], /, **kwargs: Any) -> Spec:
    """Write a buildable part of a recipe: `rule=spec(SLTT, k=1)`.

    Raises:
        ValueError: the target is not callable, a keyword is unknown, or a value does not fit the
            keyword's annotation.
    """
    return Spec(target, kwargs)


def is_path(target: Callable[..., Any], key: str) -> bool:
    """Whether a keyword is annotated as a path."""
    hint = _hints(target).get(key)
    return any(
        alternative is Path or alternative is os.PathLike
        for alternative in (hint, *typing.get_args(hint))
    )


def reference_to(name: str) -> str:
    """`@NAME`, a reference to the trained weights of recipe NAME in the same suite."""
    return f"@{name}"


def referred(path: str | os.PathLike[str]) -> str | None:
    """The NAME of a reference `@NAME`; None for any other path."""
    text = os.fspath(path)
    return text[1:] if text.startswith("@") else None


def _keywords(target: Callable[..., Any]) -> list[str]:
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, each in _signature(target).parameters.items() if each.kind in by_name]


def keywords_text(target: Callable[..., Any], prefix: str = "") -> str:
    return ", ".join(prefix + name for name in _keywords(target)) or "none"


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):
        return {}  # only a type checker can resolve the annotations, so values are not checked


def arguments_of(
    cls: type, value: Any, *, subject: str, besides: Collection[str] = ()
) -> dict[str, Any]:
    """Check the fields of a dataclass in JSON.

    Args:
        subject: the source of the value, for the message.
        besides: fields that the caller adds.

    Raises:
        ValueError: the value is not an object, or a field is missing, unknown or of another type.
    """
    require(isinstance(value, Mapping), f"{subject}: must be an object; got {value!r}")
    hints = type_hints(cls)
    known = {each.name: each for each in dataclasses.fields(cls) if each.name not in besides}
    for name, item in value.items():
        require(
            name in known,
            f"{subject}: unknown field {name!r}; it has {', '.join(known)}",
        )
        require(
            admits(hints[name], item),
            f"{subject}: {name} must be {type_name(hints[name])}; got {item!r}",
        )
    required = [name for name, each in known.items() if each.default is dataclasses.MISSING]
    missing = [name for name in required if name not in value]
    require(not missing, f"{subject}: needs {', '.join(required)}; got no {', '.join(missing)}")
    return dict(value)


def admits(hint: Any, value: Any) -> bool:
    """Whether a value fits an annotation. A Spec fits wherever a built object is expected."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(admits(alternative, value) for alternative in args)
    if origin is Literal:
        return any(
            value == alternative and type(value) is type(alternative) for alternative in args
        )
    base = type(None) if hint is None else origin or hint
    if hint is Any or not inspect.isclass(base):
        return True
    if base in (bool, int, float, str):
        accepted = (int, float) if base is float else base
        return isinstance(value, accepted) and (base is bool or not isinstance(value, bool))
    if base is Path or base is os.PathLike:
        return isinstance(value, (str, os.PathLike))
    if base in (tuple, list) and isinstance(value, (list, tuple)):
        # `Spec` stores a list as a tuple, so both fit either annotation.
        if not args or base is list or args[1:] == (Ellipsis,):
            return all(admits(args[0] if args else Any, item) for item in value)
        return len(args) == len(value) and all(map(admits, args, value))
    if isinstance(value, Spec) and base not in (list, dict, tuple, type(None)):
        return True
    try:
        return isinstance(value, base)
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


def _format_value(value: Any) -> str:
    return value.label if isinstance(value, Spec) else repr(value)
