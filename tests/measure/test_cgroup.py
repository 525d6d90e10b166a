"""Room in control groups whose files were planted, as Linux shows those of containers, pods and
jobs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.measure.memory import free_bytes, room_bytes


def plant(folder: Path, *, limit: str, used: int, cache: int, version: int = 2) -> None:
    names = {
        1: ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
        2: ("max", "current", "inactive_file"),
    }
    limits, uses, caches = names[version]
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        (limits, limit),
        (uses, str(used)),
        ("stat", f"anon {used}\n{caches} {cache}\nactive_file 50"),
    ):
        file = folder / f"memory.{name}"
        file.write_text(f"{text}\n")
        file.chmod(0o444)


def room(mount: Path, groups: str) -> int | None:
    file = mount / "groups"
    file.write_text(groups)
    return room_bytes(mount=mount, groups=file)


@pytest.mark.parametrize("group", ["/", "/kubepods/of/the/host"])
def test_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path, group: str) -> None:
    plant(tmp_path, limit="1000", used=700, cache=200)
    assert (
        room(tmp_path, f"0::{group}\n") == 1000 - 700 + 200
    )  # the cache that is not in use can be given back


def test_the_least_of_a_group_and_those_above_it(tmp_path: Path) -> None:
    """Slurm limits the job, systemd the slice that it is in; a group beside it does not count."""
    plant(tmp_path / "slice", limit="2000", used=1000, cache=0)
    plant(tmp_path / "slice/job", limit="900", used=600, cache=100)
    plant(tmp_path / "slice/job/step", limit="max", used=600, cache=100)
    plant(tmp_path / "slice/other", limit="100", used=100, cache=0)
    assert room(tmp_path, "0::/slice/job/step\n") == 400
    plant(tmp_path / "tight", limit="1200", used=1000, cache=0)
    plant(tmp_path / "tight/job", limit="900", used=600, cache=100)
    assert room(tmp_path, "0::/tight/job\n") == 200


def test_the_first_version_has_files_of_its_own(tmp_path: Path) -> None:
    plant(
        tmp_path / "memory", limit=str(2**63 - 4096), used=10**9, cache=0, version=1
    )  # which stands for none
    plant(tmp_path / "memory" / "docker" / "one", limit="1000", used=900, cache=300, version=1)
    groups = "9:name=systemd:/\n4:memory:/docker/one\n1:cpu:/\n0::/\n"
    assert room(tmp_path, groups) == 400
    plant(tmp_path / "full" / "memory", limit="1000", used=1001, cache=0, version=1)
    assert room(tmp_path / "full", groups) == 0


def test_without_a_limit_there_is_nothing_to_say(tmp_path: Path) -> None:
    plant(tmp_path, limit="max", used=700, cache=200)
    assert room(tmp_path, "0::/\n") is None
    assert room_bytes(mount=tmp_path, groups=tmp_path / "absent") is None


def test_what_is_free_is_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.measure.memory.room_bytes", lambda: None)
    assert free_bytes(torch.device("cpu")) > 10**6
    for left in (4096, 0):
        monkeypatch.setattr("pipeline.measure.memory.room_bytes", lambda left=left: left)
        assert free_bytes(torch.device("cpu")) == left
    monkeypatch.setattr("pipeline.measure.memory.room_bytes", lambda: 2**63)
    assert 10**6 < free_bytes(torch.device("cpu")) < 2**60
