"""Processes that meet to add numbers up: how fast they were, that the sum is one, and what is said where one does not come."""

from __future__ import annotations

import re
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import pytest

from pipeline.doctor import meeting, visit
from pipeline.doctor.card import Card
from pipeline.doctor.meeting import Meeting, meet, meet_here
from pipeline.ports import free_port
from tests.doctor.test_findings import NODE

pytestmark = [pytest.mark.full, pytest.mark.distributed, pytest.mark.timeout(120)]


def place(size: int) -> Meeting:
    return Meeting(host="127.0.0.1", port=free_port(), size=size, backend="gloo")


def test_two_add_up() -> None:
    where = place(2)
    with ProcessPoolExecutor(2, get_context("spawn")) as two:
        speeds = [each.result(60) for each in [two.submit(meet, where, rank) for rank in range(2)]]
    assert len(speeds) == 2 and all(1e7 < each < 1e12 for each in speeds)


def test_those_that_meet_over_another_backend_meet_over_gloo_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which stands for NCCL here: gloo by its other name."""
    agreed: list[int] = []
    original = meeting._agree

    def agree(rank: int, size: int, patience: timedelta) -> None:
        original(rank, size, patience)
        agreed.append(size)

    monkeypatch.setattr(meeting, "_agree", agree)
    monkeypatch.setattr(meeting, "NUMBERS", 1 << 10)
    for backend in ("gloo", "cpu:gloo"):
        meet(replace(place(1), backend=backend), 0)
    assert agreed == [1]
    with ProcessPoolExecutor(2, get_context("spawn")) as two:
        where = replace(place(2), backend="cpu:gloo")
        assert all(each.result(60) > 1e7 for each in [two.submit(meet, where, rank) for rank in range(2)])


def unless_gloo(where: Meeting, rank: int, patience_s: float) -> float:
    """As where the interface that gloo chooses leads nowhere."""
    if rank == 1:
        meeting._agree = lambda *about: time.sleep(2 * patience_s)
    return meet(where, rank, patience_s=patience_s)


@pytest.mark.full
def test_that_gloo_does_not_come_together_is_said() -> None:
    where = replace(place(2), backend="cpu:gloo")
    with ProcessPoolExecutor(2, get_context("spawn")) as two:
        first, _ = [two.submit(unless_gloo, where, rank, 3.0) for rank in range(2)]
        with pytest.raises(RuntimeError, match=r"^over gloo, by which workers agree: .*(?i:timed? ?out)"):
            first.result(60)


def test_cards_of_one_machine_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over gloo, where there are no cards; `doctor` asks for NCCL."""
    assert visit._met_here(0) == visit._met_here(1) == ((), "")
    monkeypatch.setattr(visit, "meet_here", lambda size, *, backend: meet_here(size, backend={"nccl": "gloo"}[backend]))
    speeds, error = visit._met_here(2)
    assert error == "" and len(speeds) == 2 and all(1e7 < each < 1e12 for each in speeds)


def unless_second(where: Meeting, rank: int, patience_s: float) -> float:
    return 0.0 if rank == 1 else meet(where, rank, patience_s=patience_s)


def test_cards_that_do_not_meet_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_meet_on_card", unless_second)
    monkeypatch.setattr(visit, "meet_here", lambda size, *, backend: meet_here(size, backend="gloo", patience_s=3))
    speeds, error = visit._met_here(2)
    assert list(speeds) == [] and re.search("(?i)timed? ?out", error)


def test_the_doctor_has_a_machines_own_cards_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with a process, over NCCL; one card alone meets nobody."""
    met: list[tuple[int, str]] = []

    def meets(size: int, *, backend: str) -> list[float]:
        met.append((size, backend))
        return [2e9] * size

    monkeypatch.setattr(visit, "meet_here", meets)
    for count, said in ((1, []), (3, ["3 processes add up with 2.00 GB/s over each link"])):
        monkeypatch.setattr(visit, "examine", lambda asked, count=count: replace(NODE, gpus=(Card(name="A"),) * count))
        found = visit.visit(tmp_path, address=None, checkpoint_bytes=0, keep=1)
        assert [each.told for each in found if each.check == "network"] == said
    assert met == [(3, "nccl")]


def test_what_is_counted_is_what_a_ring_sends_over_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four processes each link carries 3/2 of the bytes: in half a second each, the median of what is no first connection."""
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(f"pipeline.doctor.meeting.distributed.{name}", lambda *args, **named: None)
    taken = iter([60.0, 0.5, 0.1, 0.5, 0.7, 0.5])
    monkeypatch.setattr(meeting, "_add_up", lambda rank, size, device: next(taken))
    assert meet(Meeting(host="x", port=1, size=4, backend="gloo"), 0) == 1.5 * 64 * 2**20 / 0.5


def test_one_that_does_not_come_is_waited_for_in_vain() -> None:
    with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
        meet(place(2), 0, patience_s=2)


def test_more_processes_wait_longer_for_one_another() -> None:
    """64 of them load torch from one storage at once."""
    assert place(2).patience_s < 40 and 120 < place(64).patience_s < visit.MEETING_S
