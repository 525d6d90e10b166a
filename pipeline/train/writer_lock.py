"""One writer for a run's folder.

Rank 0 holds an exclusive lock on `RUN/writer.lock` as long as it lives; the kernel releases it when
the process dies. So a run can be resumed only after the last rank 0 is gone, and an abandoned
attempt cannot write to the journal or a finished checkpoint. (The other ranks write into folders
with the name of the attempt, also in a bucket.)
"""

import fcntl
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.core.errors import Diverged, UserError
from pipeline.core.run_folder import RunFolder
from pipeline.track import events as track
from pipeline.track.events import NO_ATTEMPT, Died, Hung
from pipeline.track.journal import Journal, NullTracker, Tracker, read_events
from pipeline.train.backend.collectives import Ranks
from pipeline.train.guards.storage_outage import may_be_temporary
from pipeline.train.guards.watchdog import unreported_hangs
from pipeline.train.job import read_death
from pipeline.train.recovery import StartAgain

# wait for a writer whose machine is dead: the file system releases its lock (CephFS after 5
# minutes, NFSv4 after 1.5)
PATIENCE_S = 600.0


@contextmanager
def only_writer(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Rank 0 waits until the last writer of this run is gone, and then holds the lock.
    Collective.

    Raises:
        UserError: the other writer is still there after ten minutes.
        OSError: the lock file cannot be opened, even after ten minutes; on rank 0.
    """
    with ExitStack() as held:
        ranks.broadcast_object(lambda: _lock(folder, held))
        yield


@contextmanager
def journal(folder: Path, ranks: Ranks) -> Iterator[Tracker]:
    """Rank 0's journal of a new attempt. It first records the deaths and hangs of workers since the
    last attempt, and at the end an exception that ends the attempt. The other ranks have no
    journal.
    """
    if ranks.rank != 0:
        yield NullTracker()
        return
    path = RunFolder(folder).journal
    events = read_events(path)
    attempt = 1 + max((event.attempt for event in events), default=NO_ATTEMPT)
    with Journal(path, attempt=attempt) as tracker:
        hung, death = unreported_hangs(folder, events), read_death(folder)
        for stacks, worker in hung.items():
            tracker.write(Hung(worker=worker, stacks=stacks))
        if death is not None and death["worker"] not in hung.values():
            tracker.write(Died(**death))
        RunFolder(folder).died.unlink(missing_ok=True)
        try:
            yield tracker
        except StartAgain:
            raise  # it is already in the journal
        except Exception as error:
            kind = track.Diverged if isinstance(error, Diverged) else track.Failed
            end = kind(error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
            try:
                tracker.write(end)
            except OSError as unwritten:  # a full disk, which may be this very error
                error.add_note(f"it could not be journaled: {unwritten}")
            raise


def _lock(folder: Path, held: ExitStack) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            with ExitStack() as tried:
                handle = tried.enter_context(RunFolder(folder).writer_lock.open("a"))
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held.enter_context(tried.pop_all())
                return
        except OSError as error:  # another worker has the lock, or storage is away for a while
            is_late = time.monotonic() > deadline
            if is_late and isinstance(error, BlockingIOError):
                raise UserError(
                    f"{folder}: another worker still writes this run after {PATIENCE_S:.0f} s"
                ) from None
            if is_late or not may_be_temporary(error):
                raise
        time.sleep(0.1)
