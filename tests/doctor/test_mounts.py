"""An NFS whose client remembers that a file is not there is found by what /proc/mounts says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.doctor.mounts import remembers_absence

MOUNTS = r"""
/dev/vda / ext4 rw,relatime 0 0
server:/all /shared nfs4 rw,relatime,vers=4.2,hard,proto=tcp 0 0
server:/runs /shared/runs nfs4 rw,relatime,vers=4.2,lookupcache=pos,hard 0 0
server:/old /with\040space nfs rw,vers=3 0 0
tmpfs /shared/tmp tmpfs rw 0 0
""".lstrip()


@pytest.mark.parametrize(
    ("folder", "found"),
    [
        ("/home/me/runs", None),
        ("/shared", "/shared"),
        ("/shared/mine", "/shared"),
        ("/shared/runs/mine", None),
        ("/shared/runs2", "/shared"),
        ("/shared/tmp/x", None),
        ("/with space/runs", "/with space"),
    ],
)
def test_the_mount_that_a_folder_lies_on(tmp_path: Path, folder: str, found: str | None) -> None:
    (file := tmp_path / "mounts").write_text(MOUNTS)
    assert remembers_absence(Path(folder), mounts=file) == found


def test_a_folder_that_is_a_link_lies_where_it_leads(tmp_path: Path) -> None:
    (file := tmp_path / "mounts").write_text(MOUNTS)
    (link := tmp_path / "runs").symlink_to("/shared/mine")
    assert remembers_absence(link / "run", mounts=file) == "/shared"


def test_where_no_mounts_are_listed_nothing_is_known(tmp_path: Path) -> None:
    assert remembers_absence(tmp_path, mounts=tmp_path / "none") is None
