"""Nodes with different files of spiketrain do not train together."""

from pathlib import Path

import pytest

from pipeline.core import code_version
from pipeline.core.code_version import check_same_code, code_digest
from pipeline.core.errors import UserError


def test_the_digest_depends_on_names_and_contents_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_version, "__file__", str(tmp_path / "core" / "code.py"))
    (tmp_path / "rules").mkdir()
    (file := tmp_path / "rules" / "sltt.py").write_text("decay = 0.5\n")
    digest = code_digest.__wrapped__  # as a process that has just begun
    before = digest()
    assert len(before) == 12 and digest() == before
    file.touch()
    (tmp_path / "rules" / "sltt.pyc").write_bytes(b"compiled")
    (tmp_path / "rules" / ".#sltt.py").symlink_to("me@here.1234")
    assert digest() == before
    file.write_text("decay = 0.4\n")
    changed = digest()
    file.rename(tmp_path / "rules" / "other.py")
    assert len({before, changed, digest()}) == 3


def test_a_worker_with_other_code_is_named() -> None:
    mine = code_digest()
    check_same_code("a", mine, gather=lambda value: [value, (mine, "b")])
    with pytest.raises(
        UserError,
        match=f"code of worker 0 on a, {mine}; got worker 2 on c 0123: install the same version",
    ):
        check_same_code("a", mine, gather=lambda value: [value, (mine, "b"), ("0123", "c")])
