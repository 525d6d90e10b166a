"""Events for tests that care about some of their fields."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from pipeline.track.events import KIND, KINDS, Event, from_dict
from pipeline.track.journal import Journal

_PLAIN: dict[Any, Any] = {str: "", int: 0, float: 0.0}


def event(kind: str, /, **values: Any) -> Event:
    """The event with these fields, where zero, "", None, [] and {} stand for missing ones. Values
    that are no fields go into the `summary` of a `finish` and the `figures` of a `teacher`.
    """
    hints = get_type_hints(KINDS[kind])
    plain = {each.name: _plain(hints[each.name]) for each in fields(KINDS[kind])}
    return from_dict({KIND: kind, **plain, **_nested(kind, values)})


def typed(record: dict[str, Any]) -> Event:
    """As `event`, from a JSON form that may lack fields."""
    values = dict(record)
    return event(values.pop(KIND), **values)


def _plain(hint: Any) -> Any:
    origin = getattr(hint, "__origin__", None)
    return origin() if origin in (dict, list) else _PLAIN.get(hint)


def _nested(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    mapping = {"finish": "summary", "teacher": "figures"}.get(kind)
    if mapping is None or mapping in values:
        return values
    own = {each.name for each in fields(KINDS[kind])}
    rest = {name: value for name, value in values.items() if name not in own}
    return {**{name: values[name] for name in values if name in own}, mapping: rest}


@dataclass(frozen=True, kw_only=True)
class _Raw(Event):
    """An event of any kind with any fields."""

    name: str
    values: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {KIND: self.name, "time": self.time, "attempt": self.attempt, **self.values}


class RawJournal(Journal):
    """A journal that takes any fields, whatever the kind of the event has."""

    def events(self, events: Iterable[tuple[str, dict[str, Any]]]) -> None:
        for kind, values in events:
            self.event(kind, **values)

    def event(self, kind: str, /, **values: Any) -> None:
        self.write(_Raw(name=kind, values=_nested(kind, values)))
