"""The example below each command's help: it is shown, its options are there, and the command does
not refuse it.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.core import TyperCommand
from typer.main import get_command_name

from pipeline.cli.app import app
from pipeline.launch.cluster import Cluster
from tests.helpers.small import Command, Done

ROOT = Path(__file__).parents[2]


def _epilogs(of: typer.Typer) -> Iterator[tuple[str, str]]:
    for each in of.registered_commands:
        assert each.callback is not None
        yield each.name or get_command_name(each.callback.__name__), str(each.epilog)
    for group in of.registered_groups:
        assert group.typer_instance is not None
        if not isinstance(group.name, str):  # a file of commands beside one another
            yield from _epilogs(group.typer_instance)
            continue
        yield group.name, str(group.typer_instance.info.epilog)
        yield from (
            (f"{group.name} {name}", epilog) for name, epilog in _epilogs(group.typer_instance)
        )


EPILOGS = {"": str(app.info.epilog), **dict(_epilogs(app))}
EXAMPLES = [
    (words, re.sub(r"\[.*?]", "", line).removeprefix("spiketrain "))
    for words, epilog in EPILOGS.items()
    for line in epilog.splitlines()[1:]
]
# by how an example begins, what its command calls once it has refused what it refuses by itself
WORK = {
    "launch compare/": "pipeline.launch.suite.launch_suite",
    "launch fashion/": "pipeline.launch.driver.launch_run",
    "evaluate recipes/": "pipeline.launch.evaluate.evaluate_recipe",
    "probe": "pipeline.forecast.probe.probe",
    "sweep": "pipeline.forecast.sweep.sweep",
    "plan": "pipeline.forecast.plan.plan",
    "dashboard": "pipeline.report.dashboard.app.serve",
}


def test_every_command_is_looked_at() -> None:
    assert len(EPILOGS) > 20 and {"launch", "runs", "write", "write stamps"} < set(EPILOGS)
    assert all(epilog.startswith("Example:\n") for epilog in EPILOGS.values())


@pytest.mark.parametrize("words", EPILOGS)
def test_help_shows_an_example(words: str, done: Done) -> None:
    assert re.search(r"Example: +\n spiketrain", done(*words.split(), "--help"))


@pytest.mark.parametrize(("words", "example"), EXAMPLES)
def test_an_example_is_of_its_command_and_has_its_options(
    words: str, example: str, monkeypatch: pytest.MonkeyPatch, done: Done
) -> None:
    typed, parsed = shlex.split(example), []
    monkeypatch.setattr(
        TyperCommand, "invoke", lambda self, context: parsed.append(context.command_path)
    )
    done(*typed)
    [path] = parsed
    assert f"{path} ".startswith(f"spiketrain {words}".rstrip() + " ")
    assert all((ROOT / word).is_file() for word in typed if word.endswith(".py"))


class AtWork(Exception):
    """Nothing was refused."""


@pytest.mark.parametrize(
    ("words", "at_a_time"),
    [
        ("", "auto"),
        ("--workers 2", "auto"),
        ("--side-by-side 1", 1),
        ("--workers 1:2", 1),  # as many workers as there is room for
        ("--inline", 1),  # in this process
        ("--address auto", 1),  # others may be there
        ("--address auto --side-by-side auto", "auto"),
    ],
)
def test_runs_of_a_suite_train_side_by_side_where_there_is_room(
    words: str,
    at_a_time: object,
    monkeypatch: pytest.MonkeyPatch,
    spiketrain: Command,
) -> None:
    def launched(suite: object, cluster: Cluster, *given: object, **more: object) -> None:
        assert cluster.side_by_side == at_a_time
        raise AtWork

    monkeypatch.setattr(WORK["launch compare/"], launched)
    [example] = [each for _, each in EXAMPLES if each.startswith("launch fashion/")]
    with pytest.raises(AtWork):
        spiketrain(*shlex.split(example)[:2], *words.split(), "--seeds", "2")


@pytest.mark.parametrize(("begins", "work"), WORK.items())
def test_an_example_is_not_refused(
    begins: str, work: str, monkeypatch: pytest.MonkeyPatch, spiketrain: Command
) -> None:
    def is_at_work(*given: object, **more: object) -> None:
        raise AtWork

    monkeypatch.setattr(work, is_at_work)
    [example] = [each for _, each in EXAMPLES if each.startswith(begins)]
    with pytest.raises(AtWork):
        spiketrain(*shlex.split(example))
