"""Rank 0 alone writes the journal and completes checkpoints while workers run.

Rank 0 holds an exclusive lock on `RUN/writer.lock`. The kernel releases the lock when the process
ends. So a run can be resumed only after the previous rank 0 has ended. After the resume, an earlier
attempt cannot write to the journal or to a complete checkpoint. Other ranks write their parts of a
checkpoint only to a folder named after their attempt, locally or at a remote address.
"""

import fcntl
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.core import errors
from pipeline.core.run_folder import RunFolder
from pipeline.track.events import NO_ATTEMPT, Died, Diverged, Failed, Hung
from pipeline.track.journal import Journal, NullTracker, Tracker, read_events
from pipeline.track.run_state import is_driven
from pipeline.train.backend.collectives import Ranks
from pipeline.train.guards.storage_outage import may_be_temporary
from pipeline.train.guards.watchdog import unreported_hangs
from pipeline.train.job import read_death
from pipeline.train.recovery import StartAgain

# The longest wait for the lock. If the writer's machine has failed, the file system releases the
# lock after a while (CephFS after 5 minutes, NFSv4 after 1.5).
PATIENCE_S = 600.0


@contextmanager
def only_writer(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the lock of a run's folder on rank 0, after its previous writer has ended.

    All ranks must call it.

    Raises:
        UserError: another writer still has the lock after ten minutes.
        OSError: the lock file cannot be opened or locked. If the error may be temporary, it is
            raised after ten minutes. Only rank 0 raises it.
    """
    with ExitStack() as stack:
        ranks.broadcast_object(lambda: _lock(folder, stack))
        yield


@contextmanager
def journal(folder: Path, ranks: Ranks) -> Iterator[Tracker]:
    """Rank 0's journal of a new attempt; a `NullTracker` on other ranks.

    The driver also uses it, after all workers have ended. The first events are the hangs since the
    last attempt, then the last noted death of a worker that did not hang. Any other `Exception`
    that ends the attempt, except `StartAgain`, is written as the last event.

    If the driver has died, the attempt ends for that reason, whatever this rank meets while the
    other workers are being killed. Then nothing is written, and the run counts as interrupted. A
    divergence and a refusal are written all the same.
    """
    if ranks.rank != 0:
        yield NullTracker()
        return
    path = RunFolder(folder).journal
    events = read_events(path)
    attempt = 1 + max((event.attempt for event in events), default=NO_ATTEMPT)
    with Journal(path, attempt=attempt) as tracker:
        hangs, death = unreported_hangs(folder, events), read_death(folder)
        for stacks, worker in hangs.items():
            tracker.write(Hung(worker=worker, stacks=stacks))
        if death is not None and death["worker"] not in hangs.values():
            tracker.write(Died(**death))
        RunFolder(folder).worker_death.unlink(missing_ok=True)
        try:
            yield tracker
        except StartAgain:
            raise  # the fault is already in the journal
        except Exception as error:
            if not isinstance(error, errors.UserError) and _has_lost_its_driver(folder):
                raise
            kind = Diverged if isinstance(error, errors.Diverged) else Failed
            end = kind(error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
            try:
                tracker.write(end)
            except OSError as journal_error:  # such as a full disk, which may also be `error`
                error.add_note(f"this error could not be journaled: {journal_error}")
            raise


def _has_lost_its_driver(folder: Path) -> bool:
    try:
        return RunFolder(folder).driver_lock.exists() and not is_driven(folder)
    except OSError:  # the storage does not answer, so nothing is known of the driver
        return False


def _lock(folder: Path, stack: ExitStack) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            with ExitStack() as opened:
                handle = opened.enter_context(RunFolder(folder).writer_lock.open("a"))
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                stack.enter_context(opened.pop_all())
                return
        except OSError as error:  # another worker has the lock, or storage is unavailable
            is_late = time.monotonic() > deadline
            if is_late and isinstance(error, BlockingIOError):
                raise errors.UserError(
                    f"{folder}: must have one writer; another worker still has the lock after"
                    f" {PATIENCE_S:.0f} s: stop the other launch of this run, or wait for its end"
                ) from None
            if is_late or not may_be_temporary(error):
                raise
        time.sleep(0.1)
