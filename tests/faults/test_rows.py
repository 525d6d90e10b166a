"""The tests of each fault that a run survives or refuses. docs/resuming.md says for each row what
happens, and which result its tests check.
"""

import ast
import re
import tomllib
from pathlib import Path

TESTS = Path(__file__).parent.parent
PAGE = TESTS.parent / "docs/resuming.md"
ROWS: dict[str, list[str]] = tomllib.loads(Path(__file__).with_name("rows.toml").read_text())


def test_the_page_has_each_fault_with_its_result() -> None:
    _, _, chapter = PAGE.read_text().partition("## Faults that the tests inject")
    results, faults = (
        [re.split(r" *(?<!\\)\| *", line.strip("| ")) for line in table.splitlines()[2:]]
        for table in re.findall(r"(?:^\|.*\n)+", chapter.partition("\n## ")[0], flags=re.MULTILINE)
    )
    assert [fault for fault, _, _ in faults] == list(ROWS)
    assert {result for _, _, result in faults} == {result for result, _ in results}


def test_every_test_of_the_table_is_there() -> None:
    missing = [
        test for tests in ROWS.values() for test in tests if not _is_there(*test.split("::"))
    ]
    assert missing == []


def test_every_file_of_faults_is_in_the_table() -> None:
    named = {test.split("::")[0] for tests in ROWS.values() for test in tests}
    files = {f"faults/{file.name}" for file in (TESTS / "faults").glob("test_*.py")} - {
        f"faults/{Path(__file__).name}"
    }
    assert len(files) >= 8 and files <= named


def _is_there(file: str, name: str) -> bool:
    """Under its name, and nothing skips it: no mark of its own or of its file, and no call in the
    file.
    """
    if not (TESTS / file).is_file():
        return False
    tree = ast.parse((TESTS / file).read_text())
    functions = [
        each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name == name
    ]
    marks: list[ast.AST] = [mark for each in functions for mark in each.decorator_list]
    marks += [
        each
        for each in tree.body
        if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "pytestmark"
    ]
    is_skipped = any(
        "mark.skip" in ast.unparse(mark) or "mark.xfail" in ast.unparse(mark) for mark in marks
    )
    calls = {ast.unparse(each.func) for each in ast.walk(tree) if isinstance(each, ast.Call)}
    return (
        len(functions) == 1
        and not is_skipped
        and not calls & {"pytest.skip", "pytest.importorskip", "pytest.xfail"}
    )
