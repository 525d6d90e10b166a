"""Recipes hold values: none imports what trains or measures, not even for its report."""

import ast
from pathlib import Path

NEVER = ("pipeline.launch", "pipeline.forecast", "pipeline.train.trainer", "subprocess", "ray")


def imported(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def test_no_recipe_starts_a_run_or_a_measurement() -> None:
    files = sorted(Path("recipes").rglob("*.py"))
    assert len(files) > 50
    found = {file: [name for name in imported(file) if name.startswith(NEVER)] for file in files}
    assert {file: names for file, names in found.items() if names} == {}
