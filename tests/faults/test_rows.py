"""The tests of each fault that a run survives or refuses. docs/resuming.md says for each row what
happens, and which result its tests check.
"""

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


def test_every_test_of_the_table_is_there_and_nothing_in_its_file_skips_it() -> None:
    tests = [test.split("::") for tests in ROWS.values() for test in tests]
    texts = {file: (TESTS / file).read_text() for file, _ in tests}
    assert [test for test in tests if f"\ndef {test[1]}(" not in texts[test[0]]] == []
    skips = re.compile(r"pytest\.(mark\.)?(skip|xfail|importorskip)")
    assert [file for file, text in texts.items() if skips.search(text)] == []
    here = {f"faults/{file.name}" for file in (TESTS / "faults").glob("test_*.py")}
    assert here - texts.keys() == {f"faults/{Path(__file__).name}"}
