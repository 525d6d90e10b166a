import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.track.journal import (
    Follower,
    Record,
    first,
    last,
    read,
    read_thinned,
)
from tests.helpers.events import RawJournal
from tests.helpers.waiting import until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def written(path: Path, steps: Iterable[int], *, attempt: int = 0) -> bytes:
    """A journal of step events; all its bytes."""
    with RawJournal(path, attempt=attempt) as journal:
        for step in steps:
            journal.event("step", step=step, text="é")
    return path.read_bytes()


def steps_of(events: list[Record]) -> list[int]:
    return [event["step"] for event in events]


def test_an_event_is_one_line_with_its_kind_first(path: Path):
    before = time.time()
    written(path, [7], attempt=2)
    (line,) = path.read_text().splitlines()
    event = json.loads(line)
    assert list(event) == ["event", "time", "attempt", "step", "text"]
    assert before <= event.pop("time") <= time.time()
    assert event == {"event": "step", "attempt": 2, "step": 7, "text": "é"}


def test_what_json_has_no_form_for(path: Path):
    given: dict[str, Any] = {
        "metrics": {"a": math.nan, "b": math.inf, "c": -math.inf, "d": torch.tensor(1.5)},
        "more": {"e": np.float32("nan"), "f": np.int64(3)},
        "where": Path("a/b"),
        "text": "line\nbreak \u2028 and \ud800",
        "shape": (2, np.array([1.0, math.nan])),
    }
    with RawJournal(path, attempt=0) as journal:
        journal.event("step", **given)
    (line,) = path.read_bytes().splitlines()
    found, nan = json.loads(line), pytest.approx(math.nan, nan_ok=True)
    assert {name: found[name] for name in given} == {
        "metrics": {"a": nan, "b": math.inf, "c": -math.inf, "d": 1.5},
        "more": {"e": nan, "f": 3},
        "where": "a/b",
        "text": given["text"],
        "shape": [2, [1.0, nan]],
    }


def test_misuse_is_refused_and_writes_nothing(path: Path):
    journal = RawJournal(path, attempt=0)
    with pytest.raises(TypeError, match="must have a JSON form; got object"):
        journal.event("step", what=object())
    journal.close()
    journal.close()
    with pytest.raises(ValueError, match="closed"):
        journal.event("step")
    assert path.read_bytes() == b""


def test_a_torn_last_line_is_skipped_and_the_next_attempt_begins_on_a_fresh_one(path: Path):
    whole = written(path, [0, 1])
    for cut in range(1, 30):
        path.write_bytes(whole[:-cut])
        assert steps_of(read(path)) == [0]
        # Without its newline alone the line was whole: it counts once another attempt has ended it.
        found = written(path, [2, 3], attempt=1)
        assert steps_of(read(path)) == ([0, 1, 2, 3] if cut == 1 else [0, 2, 3])
        assert b"\n\n" not in found


def test_a_short_write_is_an_error_and_spoils_one_line_only(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    journal, write = RawJournal(path, attempt=0), os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:10]))
        with pytest.raises(OSError, match="only 10 of"):
            journal.event("step", step=0)
    journal.event("step", step=1)
    assert steps_of(read(path)) == [1]


def writer(path: Path, *, attempt: int, events: int) -> subprocess.Popen[bytes]:
    """A process that writes so many long events."""
    code = (
        "import sys; from tests.helpers.events import RawJournal\n"
        "j = RawJournal(sys.argv[1], attempt=int(sys.argv[2]))\n"
        "for i in range(int(sys.argv[3])): j.event('step', step=i, text=sys.argv[2] * 3000)"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(path), str(attempt), str(events)])


def test_killed_while_writing_every_line_but_the_last_is_whole(path: Path):
    process = writer(path, attempt=0, events=10**9)
    until(lambda: path.exists() and path.stat().st_size > 1_000_000, within=60, process=process)
    process.kill()
    process.wait()
    found = steps_of(read(path))
    assert found == list(range(len(found)))
    assert len(found) >= path.read_bytes().count(b"\n") > 100


def test_two_writers_do_not_mix_their_lines(path: Path):
    writers = [writer(path, attempt=attempt, events=500) for attempt in (1, 2)]
    assert [process.wait() for process in writers] == [0, 0]
    events = read(path)
    assert len(events) == 1000
    assert all(event["text"] == str(event["attempt"]) * 3000 for event in events)


def test_follower_returns_each_event_once_while_the_file_grows(path: Path):
    follower = Follower(path)
    assert follower.poll() == []  # no journal yet
    whole, seen, at = written(path, range(20)), list[int](), 0
    path.write_bytes(b"")
    chance = random.Random(0)
    while at < len(whole):
        grown = at + chance.randrange(1, 90)
        with path.open("ab") as file:
            file.write(whole[at:grown])
        at = grown
        seen += steps_of(follower.poll())
    assert seen == list(range(20)) and follower.offset == len(whole)
    # replaced
    path.write_bytes(b'{"event": "step", "step": 9}\n')
    assert steps_of(follower.poll()) == [9]


def test_follower_starts_at_any_byte_and_reads_in_bounded_blocks(path: Path):
    whole = written(path, range(20))
    starts = [0, *(place + 1 for place, byte in enumerate(whole) if byte == ord("\n"))]
    for offset in range(len(whole) + 1):
        follower = Follower(path, offset=offset)
        blocks = list(map(steps_of, iter(partial(follower.poll, limit_bytes=200), [])))
        assert [*chain(*blocks)] == [step for step in range(20) if starts[step] >= offset]
        assert max(map(len, blocks), default=0) < 6 and follower.offset == len(whole)


def test_follower_inside_an_unfinished_line_waits_for_its_end(path: Path):
    path.write_bytes(b'{"event": "st')
    follower = Follower(path, offset=5)
    assert follower.poll() == []
    path.write_bytes(path.read_bytes() + b'ep", "step": 0}\n{"event": "step", "step": 1}\n')
    assert steps_of(follower.poll()) == [1]


def test_first_and_last_of_a_kind(path: Path):
    assert first(path, "start") is None
    path.touch()
    assert last(path, "start") is None
    with RawJournal(path, attempt=0) as journal:
        for step in range(3):
            journal.event("step", step=step, text='{"event": "evaluation", "step": 99}')
            journal.event("evaluation", step=step)
        journal.event("epoch", step=2)
    with path.open("ab") as file:
        file.write(b'{"event": "evaluation", "step": 3')
    events = read(path)
    for find, kinds, wanted in (
        (first, ["evaluation"], events[1]),
        (last, ["evaluation"], events[5]),
        (last, ["evaluation", "epoch"], events[6]),
        (first, ["epoch", "step"], events[0]),
        (last, ["finish"], None),
    ):
        assert find(path, *kinds) == wanted


def test_a_long_journal_is_thinned_and_what_came_before_another_event_stays(path: Path):
    assert read_thinned(path, "step", every=4) == []
    with RawJournal(path, attempt=0) as journal:
        journal.event("start", step=0)
        for step in range(1, 11):
            journal.event("step", step=step)
    path.write_bytes(path.read_bytes() + b'{"event": "step", "ti')  # killed
    with RawJournal(path, attempt=1) as journal:
        journal.event("start", step=8)
        for step in range(9, 14):
            journal.event("step", step=step)
            journal.event("evaluation", step=step) if step == 12 else None
    path.write_bytes(path.read_bytes() + b'{"event": "step", "ti')
    found = read_thinned(path, "step", every=4)
    kept = [0, 4, 8, 10, 8, 10, 12, 12, 13]
    kinds = {0: "start", 4: "start", 7: "evaluation"}
    assert [(event["event"], event["step"]) for event in found] == [
        (kinds.get(place, "step"), step) for place, step in enumerate(kept)
    ]
    assert read_thinned(path, "step", every=1) == read(path)
