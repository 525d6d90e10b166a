"""The events of a journal: both ways to JSON, and their names in one place."""

import ast
import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import pipeline
from pipeline.core.run_folder import RunFolder
from pipeline.track.events import KIND, KINDS, Event, Finish, Step, from_dict
from pipeline.track.journal import last_event, read, read_events
from tests.helpers.events import RawJournal, event

VALUES: dict[Any, Any] = {
    str: "a name",
    int: 3,
    float: math.inf,
    str | None: None,
    int | None: None,
    float | None: -math.inf,
    dict[str, float]: {"a": 0.5, "b": math.inf},
    dict[str, dict[str, float]]: {"layer": {"a": -math.inf}},
    dict[str, str]: {"torch": "2"},
    dict[str, Any]: {"a": {"b": [1, None, "x"]}},
    dict[str, dict[str, Any]]: {"1": {"times": 2.0, "host": "h"}},
    list[str]: ["a", "b"],
    list[int] | None: [0, 1],
}


@pytest.mark.parametrize("kind", KINDS.values())
def test_an_event_is_read_as_it_was_written(tmp_path: Path, kind: type[Event]) -> None:
    hints = get_type_hints(kind)
    written = kind(**{field.name: VALUES[hints[field.name]] for field in fields(kind)})
    with RawJournal(tmp_path / "journal.jsonl", attempt=2) as journal:
        journal.write(written)
    [found] = read_events(tmp_path / "journal.jsonl")
    assert type(found) is kind and found.attempt == 2 and 0 < found.time < math.inf
    assert found.to_dict() == {**written.to_dict(), "time": found.time, "attempt": 2}
    assert list(read(tmp_path / "journal.jsonl")[0])[:3] == [KIND, "time", "attempt"]


def test_a_number_that_is_not_finite_stays_a_number_and_text_stays_text(tmp_path: Path) -> None:
    with RawJournal(tmp_path / "journal.jsonl", attempt=0) as journal:
        journal.write(event("step", metrics={"loss": math.nan}))
        journal.write(event("failed", error="nan"))
    step, failed = read_events(tmp_path / "journal.jsonl")
    assert isinstance(step, Step) and math.isnan(step.metrics["loss"])
    assert getattr(failed, "error", None) == "nan"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            {KIND: "init", "time": 1.0, "attempt": 0, "file": "x", "files": 2},
            "an event 'init' must have the fields time, attempt, file, fresh; got time, attempt,"
            " file, files: Init.__init__() got an unexpected keyword argument 'files'",
        ),
        (
            {KIND: "invented", "time": 1.0, "attempt": 0},
            "an event must be of a kind that this version knows; got 'invented'",
        ),
    ],
)
def test_an_event_of_another_version_is_refused_in_one_line(
    record: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError) as refused:
        from_dict(record)
    assert str(refused.value) == f"journal: {said}"


def test_the_newest_event_of_some_classes(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert last_event(path, Step, Finish) is None
    with RawJournal(path, attempt=0) as journal:
        for each in (event("step", step=1), event("step", step=2), event("init")):
            journal.write(each)
    assert getattr(last_event(path, Step, Finish), "step", None) == 2


# ------------------------------------------------------------------------- names that stand once

OWNERS = ("core/run_folder.py", "track/events.py")
FILES = {
    path.name
    for path in vars(RunFolder("folder")).values()
    if isinstance(path, Path) and path.suffix
}
READERS = {"event", "first", "last", "read", "read_thinned"}


def spelt_out(source: str) -> Iterator[str]:
    """File names of a run, and kinds of events where events are read or written."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value in {KIND, *FILES}:
            yield str(node.value)
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            values = [each.value for each in node.args if isinstance(each, ast.Constant)]
            yield from (value for value in values if name in READERS and value in KINDS)


def test_what_is_spelt_out_is_found() -> None:
    source = (
        'last(run / "journal.jsonl", "step")\nevent["event"]\njournal.event("start")\nprint("step")'
    )
    assert sorted(spelt_out(source)) == ["event", "journal.jsonl", "start", "step"]


def test_no_event_and_no_file_of_a_run_is_spelt_out_elsewhere() -> None:
    root = Path(pipeline.__file__).parent
    found = {
        str(file.relative_to(root)): names
        for file in sorted(root.rglob("*.py"))
        if file.relative_to(root).as_posix() not in OWNERS
        and (names := list(spelt_out(file.read_text())))
    }
    assert len(FILES) >= 15 and found == {}
