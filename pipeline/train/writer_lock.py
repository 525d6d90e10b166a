"""One writer for a run's folder, however many processes once trained it.

Rank 0 holds an exclusive lock on `RUN/writer.lock` for as long as it lives, and the kernel lets go
of it when the process dies: a run can be resumed only after the last rank 0 is gone, and nothing of
an abandoned attempt can reach the journal or a finished checkpoint. (The other ranks write into
folders that carry the attempt's name, in a bucket too.)"""

from __future__ import annotations

import fcntl
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.core.errors import Diverged, UserError
from pipeline.core.run_folder import RunFolder
from pipeline.track import events as track
from pipeline.track.events import OF_NONE, Died, Event, Hung
from pipeline.track.journal import Journal, NullTracker, Tracker, read_events
from pipeline.train.backend.collectives import Ranks
from pipeline.train.guards.anomaly import Rollback
from pipeline.train.guards.deaths import forget_death, noted
from pipeline.train.guards.storage import may_pass
from pipeline.train.guards.watchdog import untold

PATIENCE_S = 600.0
"""for a writer whose machine is dead: its lock goes when the file system gives it up (CephFS after
5 minutes, NFSv4 after 1.5)
"""


@contextmanager
def only_writer(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Rank 0 waits until the last writer of this run is gone, then holds the run until it goes
    itself; collective.

    Raises:
        UserError: the other one is still there after ten minutes.
        OSError: so is what keeps rank 0 from looking; on rank 0, which the others wait for.
    """
    with ExitStack() as held:
        ranks.broadcast_object(lambda: _lock(folder, held))
        yield


@contextmanager
def journal(folder: Path, ranks: Ranks) -> Iterator[Tracker]:
    """Rank 0's journal of a new attempt, to which an exception that ends it is told; the others
    tell nobody.

    It begins with what has ended workers since the last one, where they could not tell it
    themselves.
    """
    if ranks.rank != 0:
        yield NullTracker()
        return
    path = RunFolder(folder).journal
    events = read_events(path)
    attempt = max((event.attempt for event in events), default=OF_NONE) + 1
    with Journal(path, attempt=attempt) as tracker:
        _tell_ends(folder, events, tracker)
        try:
            yield tracker
        except Rollback:
            raise  # it has told
        except Exception as error:
            kind = track.Diverged if isinstance(error, Diverged) else track.Failed
            end = kind(error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
            try:
                tracker.write(end)
            except OSError as unwritten:  # a full disk, which may be the very error that is told
                error.add_note(f"the journal could not be told of it: {unwritten}")
            raise


def _tell_ends(folder: Path, events: Sequence[Event], tracker: Tracker) -> None:
    hung = untold(folder, events)
    for stacks, worker in hung.items():
        tracker.write(Hung(worker=worker, stacks=stacks))
    if (death := noted(folder)) is not None and death["worker"] not in hung.values():
        tracker.write(Died(**death))
    if death is not None:
        forget_death(folder)


def _lock(folder: Path, held: ExitStack) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not _is_locked(folder, held, is_last=time.monotonic() > deadline):
        time.sleep(0.1)


def _is_locked(folder: Path, held: ExitStack, *, is_last: bool) -> bool:
    """Whether it is ours now; storage that is away is looked for again, too."""
    try:
        with ExitStack() as tried:
            handle = tried.enter_context(RunFolder(folder).writer_lock.open("a"))
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held.enter_context(tried.pop_all())
    except BlockingIOError:
        if is_last:
            raise UserError(
                f"{folder}: another worker still writes this run after {PATIENCE_S:.0f} s"
            ) from None
    except OSError as error:
        if is_last or not may_pass(error):
            raise
    else:
        return True
    return False
