"""What a run has decided goes into its checkpoints, and from there into a folder that does not know."""

from __future__ import annotations

from pathlib import Path

from pipeline.run.decided import FILES, adopt, decided


def test_a_folder_takes_what_it_lacks_and_keeps_what_it_has(tmp_path: Path) -> None:
    told = {name: [name] for name in FILES}
    (tmp_path / FILES[0]).write_text('"newer"')
    adopt(tmp_path, {**told, "../elsewhere.json": 1})
    assert decided(tmp_path) == {**told, FILES[0]: "newer"} and len(FILES) == 3
    assert {path.name for path in tmp_path.iterdir()} == set(FILES) and not (tmp_path.parent / "elsewhere.json").exists()


def test_nothing_was_decided(tmp_path: Path) -> None:
    adopt(tmp_path, decided(tmp_path))
    assert decided(tmp_path) == {} and not list(tmp_path.iterdir())
