"""Events for tests that care about some of their fields."""

from dataclasses import fields
from typing import Any, get_type_hints

from pipeline.track.events import Event, Rest, declared, from_dict, kind_of

_PLAIN: dict[Any, Any] = {str: "", int: 0, float: 0.0}


def event(kind: str, /, **values: Any) -> Event:
    """The event with this JSON form, where zero, "", None, [] and {} stand for missing fields."""
    kind_ = kind_of({"event": kind})
    rest = {name for name, _ in declared(kind_, Rest)}
    hints = get_type_hints(kind_)
    plain = {each.name: _plain(hints[each.name]) for each in fields(kind_) if each.name not in rest}
    return from_dict({"event": kind, **({} if kind_.kind == "unknown" else plain), **values})


def typed(record: dict[str, Any]) -> Event:
    """As `event`, from a JSON form that may lack fields."""
    values = dict(record)
    return event(values.pop("event"), **values)


def _plain(hint: Any) -> Any:
    origin = getattr(hint, "__origin__", None)
    return origin() if origin in (dict, list) else _PLAIN.get(hint)
