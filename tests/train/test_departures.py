"""What a rank knows of machines that leave, and when it is time for a last save."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from pipeline.train import checkpointing
from pipeline.train.checkpointing import MARGIN_S, Departures
from pipeline.train.job import Notice


def test_a_notice_is_new_where_it_names_a_machine_that_none_has_named() -> None:
    known = Departures()
    for machines, is_new in (
        (("a",), True),
        (("a",), False),
        (("a", "b"), True),
        (("b",), False),
        (("c",), True),
    ):
        notice = Notice(machines, None)
        assert known.is_new(notice) is is_new
        known.add(notice)
    assert known.machines == {"a", "b", "c"} and not known.is_new(None)
    assert not known.is_last_call(batch_s=1e9, write_s=1e9)  # nobody knows when


def test_a_last_save_comes_while_there_is_time_for_twice_a_batch_and_a_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 50.0
    monkeypatch.setattr(checkpointing, "time", SimpleNamespace(monotonic=lambda: now))
    known = Departures()
    for machine, left in (("a", 100.0), ("b", 300.0)):  # the first to leave counts
        known.add(Notice((machine,), time.time() + left))
    latest = 50.0 + 100.0 - 2 * (3.0 + 4.0) - MARGIN_S
    now = latest - 1
    assert not known.is_last_call(batch_s=3.0, write_s=4.0)
    now = latest + 1
    assert known.is_last_call(batch_s=3.0, write_s=4.0)
    known.end()
    assert not known.is_last_call(batch_s=3.0, write_s=4.0)
