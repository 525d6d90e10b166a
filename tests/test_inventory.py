"""What a user had at commit 082bf30 is still there, each with its test: tests/inventory.toml."""

import ast
import inspect
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.faults.test_rows import ROWS
from tests.helpers.small import recipes_of
from tests.test_cli import commands
from tests.test_names import resolved

INVENTORY = tomllib.loads(Path("tests/inventory.toml").read_text())
DROPPED = INVENTORY["dropped"]
SHOWN = {
    f"{area} {text}": test
    for area, texts in INVENTORY["shown"].items()
    for text, test in texts.items()
}


def pairs(section: str) -> list[str]:
    return [f"{name} {each}" for name, found in INVENTORY[section].items() for each in found]


ENTRIES: dict[str, list[str]] = {
    "command": list(INVENTORY["commands"]),
    "option": list(INVENTORY["options"]),
    "value": list(INVENTORY["values"]),
    "name": list(INVENTORY["names"]),
    "keyword": pairs("keywords"),
    "recipe": pairs("recipes"),
    "fault": INVENTORY["faults"]["rows"],
    "shown": list(SHOWN),
}


@cache
def command_line() -> dict[str, set[str]]:
    """Commands, options and values, as the inventory writes them, from the command line itself."""
    found: dict[str, set[str]] = {"command": set(), "option": set(), "value": set()}
    for words, made in commands():
        command = " ".join(words)
        found["command"].add(command)
        for parameter in made.params:
            option = next((f" {name}" for name in parameter.opts if name.startswith("--")), "")
            if option:
                found["option"].add(command + option)
            choices = getattr(parameter.type_descriptor, "choices", None) or ()
            found["value"] |= {f"{command}{option} {value}" for value in choices}
    return found


def takes(name: str, keyword: str) -> bool:
    part = resolved(name)
    return part is not None and keyword in inspect.signature(part).parameters


@cache
def names_of_runs(path: str) -> set[str]:
    return {recipe.name for recipe in recipes_of(Path(path))} if Path(path).exists() else set()


@cache
def said_by_the_product() -> str:
    """Its pages, and the strings of its code without the docstrings."""
    found = [file.read_text() for file in sorted(Path("pipeline").rglob("*.html"))]
    for file in sorted(Path("pipeline").rglob("*.py")):
        nodes = [*ast.walk(ast.parse(file.read_text()))]
        alone = {id(each.value) for each in nodes if isinstance(each, ast.Expr)}
        strings = [
            each for each in nodes if isinstance(each, ast.Constant) and id(each) not in alone
        ]
        found += [each.value for each in strings if isinstance(each.value, str)]
    return "\n".join(found)


IS_THERE: dict[str, Callable[[str], bool]] = {
    **{
        kind: lambda entry, kind=kind: entry in command_line()[kind]
        for kind in ("command", "option", "value")
    },
    "name": lambda entry: resolved(entry) is not None,
    "keyword": lambda entry: takes(*entry.split()),
    "recipe": lambda entry: entry.split()[1] in names_of_runs(entry.split()[0]),
    "fault": lambda entry: bool(ROWS.get(entry)),
    "shown": lambda entry: entry.partition(" ")[2] in said_by_the_product(),
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_nothing_is_lost_but_what_the_design_drops(kind: str) -> None:
    kept = [entry for entry in ENTRIES[kind] if f"{kind} {entry}" not in DROPPED]
    assert ENTRIES[kind] and [entry for entry in kept if not IS_THERE[kind](entry)] == []


def test_what_is_dropped_was_there_and_is_gone_in_the_end() -> None:
    known = {
        f"{kind} {entry}": (kind, entry) for kind, entries in ENTRIES.items() for entry in entries
    }
    assert [entry for entry in DROPPED if entry not in known] == []
    if INVENTORY["all_dropped"]:
        assert [entry for entry in DROPPED if IS_THERE[known[entry][0]](known[entry][1])] == []


def test_every_test_that_the_inventory_names_exists() -> None:
    shown_by = {f"shown {entry}": test for entry, test in SHOWN.items()}
    for kind in ("command", "option", "value", "name"):
        shown_by |= {f"{kind} {entry}": test for entry, test in INVENTORY[f"{kind}s"].items()}
    named = {test for entry, test in shown_by.items() if entry not in DROPPED}
    assert {test for test in named if not is_test(*test.split("::"))} == set()


@cache
def is_test(file: str, name: str) -> bool:
    body = ast.parse(Path(file).read_text()).body if Path(file).exists() else []
    return name in [each.name for each in body if isinstance(each, ast.FunctionDef)]
