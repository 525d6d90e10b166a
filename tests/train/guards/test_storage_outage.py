"""Storage that is away for a while: tried again by rank 0 while all ranks show that they live, and
given up in the end.
"""

import errno
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from pipeline.core.errors import UserError
from pipeline.train.backend.collectives import Ranks
from pipeline.train.guards import storage_outage
from pipeline.train.guards.storage_outage import retry_during_outage
from tests.helpers.processes import run_ranks


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_outage, "FIRST_PAUSE_S", 0.01)


def away(times: int, error: Exception = OSError(errno.ESTALE, "Stale file handle")) -> Mock:
    """Fails so often, then answers."""
    return Mock(side_effect=[*[error] * times, "there"])


def test_it_is_tried_again_and_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(storage_outage, "_pause", lambda seconds, beat: pauses.append(seconds))
    told: list[str] = []
    assert retry_during_outage(Ranks(), away(20), on_wait=told.append) == "there"
    assert told == ["[Errno 116] Stale file handle"]
    assert (
        pauses[:3] == [0.01, 0.02, 0.04]
        and pauses[-1] == storage_outage.LONGEST_PAUSE_S
        and len(pauses) == 20
    )


def test_a_pause_is_full_of_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it is: a watchdog may have less patience."""
    monkeypatch.setattr(storage_outage, "FIRST_PAUSE_S", 0.5)
    monkeypatch.setattr(storage_outage, "BEAT_S", 0.1)
    beat = Mock()
    retry_during_outage(Ranks(), away(1), beat=beat)
    assert 1 < beat.call_count <= 6


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only file system"),
        PermissionError("Access Denied"),  # as s3fs says it, without a number
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        UserError("checkpoint: must hold data alone"),
        ZeroDivisionError(),
    ],
    ids=lambda error: type(error).__name__ + str(getattr(error, "errno", "")),
)
def test_what_waiting_does_not_mend_is_raised_at_once(error: Exception) -> None:
    told: list[str] = []
    with pytest.raises(type(error)) as raised:
        retry_during_outage(Ranks(), away(1, error), on_wait=told.append)
    assert raised.value is error and told == []


def test_in_the_end_it_is_given_up_and_a_journal_on_the_same_storage_need_not_be_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    assert retry_during_outage(Ranks(), away(2), on_wait=full) == "there"
    monkeypatch.setattr(storage_outage, "OUTAGE_TIMEOUT_S", 0.2)
    with pytest.raises(OSError, match="Stale file handle"):
        retry_during_outage(Ranks(), away(1000), on_wait=full)


def _of_two(rank: int, ranks: int) -> dict[str, Any]:
    storage_outage.FIRST_PAUSE_S, storage_outage.BEAT_S = 0.2, 0.1
    act, beat, told = away(2), Mock(), Mock()
    found = retry_during_outage(Ranks(rank, ranks), act, beat=beat, on_wait=told)
    counts = {"acted": act.call_count, "told": told.call_count, "beats": beat.call_count}
    return {"found": found, **counts}


@pytest.mark.distributed
@pytest.mark.timeout(60)
def test_of_two_ranks_one_tries_and_both_live(tmp_path: Path) -> None:
    first, second = run_ranks(_of_two, 2, tmp_path)
    assert (first["found"], first["acted"], first["told"]) == ("there", 3, 1)
    assert (second["found"], second["acted"], second["told"]) == ("there", 0, 0)
    assert min(first["beats"], second["beats"]) > 2  # one in each of two pauses would be two
