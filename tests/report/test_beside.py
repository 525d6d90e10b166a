"""What is measured beside a run is measured once, and anew where it must be."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from recipes.compare.claims_base import beside


class Asked:
    """A measurement that counts how often it is made."""

    def __init__(self, file: Path) -> None:
        self.file, self.made, self.refusal = file, 0, ""

    def __call__(self, machine: str = "a") -> tuple[int | None, str]:
        console = Console(file=io.StringIO(), width=200)
        found = beside(
            self.file,
            rests_on={"machine": machine},
            measure=self._measure,
            parse=lambda value: value["made"],
            console=console,
        )
        return found, console.file.getvalue()  # type: ignore[attr-defined]

    def _measure(self) -> dict[str, int]:
        if self.refusal:
            raise ValueError(self.refusal)
        self.made += 1
        return {"made": self.made}


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    return Asked(tmp_path / "seen.json")


def test_it_is_measured_once_and_anew_where_what_it_rests_on_is_no_more(asked: Asked) -> None:
    assert asked() == asked() == (1, "")
    assert asked("b") == (2, f"{asked.file}: of no use, for it is of another machine\n")
    assert asked("b") == (2, "")


def test_where_it_cannot_be_measured_a_line_says_why_and_what_is_kept_is_shown_all_the_same(
    asked: Asked,
) -> None:
    asked.refusal = "no data here"
    assert (
        asked() == (None, f"{asked.file}: not measured: no data here\n") and not asked.file.exists()
    )
    asked.refusal = ""
    assert asked() == (1, "")
    asked.refusal = "no data here"
    assert asked() == (1, "")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"rests_on": []}', '{"rests_on": {"machine": "a"}, "found": {}}']
)
def test_a_damaged_file_is_measured_anew(asked: Asked, text: str) -> None:
    asked.file.write_text(text)
    found, said = asked()
    assert (
        found == 1
        and f"{asked.file}: of no use, for it is damaged, or of an earlier version: " in said
    )
    assert json.loads(asked.file.read_text())["found"] == {"made": 1} and asked() == (1, "")


def test_where_nothing_can_be_read_or_written_only_the_file_is_lost(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked.file.mkdir()  # can be neither read nor written, not even by root
    found, said = asked()
    unreadable, unwritten = said.splitlines()
    assert found == 1 and unreadable.endswith("of no use, for it cannot be read: Is a directory")
    assert unwritten.endswith(
        "what was measured is not kept, and the next report does it anew: Is a directory"
    )
    asked.file.rmdir()

    def refuse(file: Path, value: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("recipes.compare.claims_base.write_json", refuse)
    found, said = asked()
    assert found == 2 and said.endswith("does it anew: Read-only file system\n")
