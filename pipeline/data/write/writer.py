"""Writes sets of samples to `train.beton` and `val.beton`, with a manifest beside each.

    open a source, encode its samples in one or several processes, store them in order, report

A file appears under its final name complete or not at all. Its bytes do not depend on the number of
workers.
"""

import errno
import os
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path
from signal import SIG_IGN, SIGINT, signal
from typing import Any, Literal, get_args

from pipeline.core.errors import DataError, LoaderError, require_data
from pipeline.core.files import sync_folder
from pipeline.core.units import counted
from pipeline.data.ffcv import manifest as manifests
from pipeline.data.ffcv.format import BetonWriter
from pipeline.data.ffcv.manifest import ContentHash, Manifest
from pipeline.data.ffcv.page_checks import verify

CHUNK, AHEAD = 16, 32  # samples per task of a worker, and per worker in all its tasks
Existing = Literal["refuse", "replace", "keep"]
Progress = Callable[[int, int], None]  # samples done, total samples, over both sets


@dataclass(frozen=True)
class Source:
    """The samples of one set in the order of the file."""

    name: str  # train or val
    classes: list[str]  # a name's position is its label
    items: Sequence[Any]  # each has a `label`, and `str` names it in error messages
    where: str
    left_out: tuple[str, ...] = ()  # see Manifest


@dataclass(frozen=True)
class Encoded:
    payload: bytes
    attributes: dict[str, int]  # stored in the file beside the label (format.py)
    counted: dict[str, int]  # summed over the samples for the manifest
    groups: dict[str, str] = field(default_factory=dict)  # stored per sample in the manifest


class TooManyUnreadable(DataError):
    """More unreadable samples than allowed. `unreadable` lists them, as `Manifest.skipped` does."""

    def __init__(self, message: str, unreadable: list[dict[str, str]]) -> None:
        super().__init__(message)
        self.unreadable = unreadable


def write_sets(
    sets: Sequence[Source],
    out: Path,
    how: Any,
    *,
    workers: int = 1,
    max_bad: int = 0,
    progress: Progress | None = None,
    existing: Existing = "refuse",
) -> list[Manifest]:
    """Write each set to `out/<its name>.beton`, encoded by `how`.

    Args:
        how: a frozen dataclass. Called with a sample, it returns it `Encoded`, or the reason why it
            cannot be. `how.kind` is that of the file (format.py). Its fields are stored in the
            manifest, and worker processes get a copy.
        max_bad: the number of samples in each set that may be unreadable. They are omitted and
            listed in the manifest.
        existing: "refuse" or "replace" existing files, or "keep" them after all their bytes were
            verified.

    Raises:
        DataError: more samples than `max_bad` are unreadable (after all samples of both sets were
            tried), `out` is already written, or the disk is full.
        LoaderError: a worker died or hung.
    No file remains after an error.
    """
    require_data(
        workers >= 1 and max_bad >= 0 and existing in get_args(Existing),
        "write: workers must be 1 or more, max_bad 0 or more, existing 'refuse', 'replace' or"
        f" 'keep'; got workers={workers}, max_bad={max_bad}, existing={existing!r}",
    )
    finals = [Path(out) / f"{each.name}.beton" for each in sets]
    there = [str(final) for final in finals if final.exists()]
    if existing == "keep" and len(there) == len(finals):
        return _verified(finals, how)
    require_data(
        not there or existing == "replace",
        f"write: {' and '.join(there)} must not exist yet; remove them, or ask with --existing"
        " replace",
    )
    Path(out).mkdir(parents=True, exist_ok=True)
    total, done = sum(len(each.items) for each in sets), count(1)
    report = lambda: progress(next(done), total) if progress else None
    beside = [final.with_name(final.name + manifests.SUFFIX) for final in finals]
    with ExitStack() as held:  # renames the files together, once all are complete
        written = [
            _store(each, held.enter_context(_whole_or_nothing(final)), how, workers, report)
            for each, final in zip(sets, finals, strict=True)
        ]
        _refuse_unreadable(written, how.kind.name, max_bad)
        for path in beside:
            # An old manifest must not vouch for a new file, nor a new one for an old file.
            path.unlink(missing_ok=True)
    for manifest, path in zip(written, beside, strict=True):
        manifest.write(path)
    return written


def check_kept(written: Sequence[Manifest], sets: Sequence[Source]) -> None:
    """Check that kept files were written from the requested sets.

    Raises: DataError that names the samples of the files.
    """
    for manifest, each in zip(written, sets, strict=True):
        held = manifest.samples + len(manifest.skipped)
        require_data(
            (held, manifest.source) == (len(each.items), each.where),
            f"write: {manifest.file} was written from {counted(held, 'sample')} of"
            f" {manifest.source}; got {len(each.items)} of {each.where}; ask with --existing"
            " replace",
        )


def encode_all(
    items: Iterable[Any], how: Any, *, workers: int, stall_s: float = 300.0
) -> Iterator[tuple[Any, Encoded | str]]:
    """Encode in order, in `workers` processes (1: in this one).

    Raises: LoaderError if a worker process dies, or the samples in work, at most `AHEAD` per
        worker, take more than `stall_s` seconds.
    """
    if workers == 1:
        yield from ((item, how(item)) for item in items)
        return
    # Spawned, because a fork would leave the threads of this process (torch, numba) in an unknown
    # state.
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=signal, initargs=(SIGINT, SIG_IGN)
    )
    samples, batch = iter(items), []
    try:
        while batch := list(islice(samples, AHEAD * workers)):
            results = pool.map(how, batch, chunksize=CHUNK, timeout=stall_s)
            yield from zip(batch, results, strict=True)
    except BrokenProcessPool as error:
        raise LoaderError(
            f"write: a worker process died while samples from {batch[0]} on were encoded"
        ) from error
    except TimeoutError as error:
        raise LoaderError(
            f"write: samples {batch[0]} to {batch[-1]} were not encoded within {stall_s:g} s"
        ) from error
    finally:
        # CPython 3.11 to 3.13 have no public method to end a hanging worker; 3.14 has
        # terminate_workers().
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.kill()  # a stopped process would not receive SIGTERM
        pool.shutdown(wait=True, cancel_futures=True)


def _verified(files: Sequence[Path], how: Any) -> list[Manifest]:
    kept = [manifest for file in files for manifest in verify(file)]
    for manifest in kept:
        require_data(
            manifest.options == asdict(how),
            f"write: {manifest.file} was written with {manifest.options}; got {asdict(how)}; ask"
            " with --existing replace",
        )
    return kept


def _refuse_unreadable(written: Sequence[Manifest], kind: str, max_bad: int) -> None:
    if all(each.samples and len(each.skipped) <= max_bad for each in written):
        return
    counts = [
        f"{len(each.skipped)} of {each.samples + len(each.skipped)} in {each.file}"
        for each in written
    ]
    raise TooManyUnreadable(
        f"write: at most {counted(max_bad, kind)} of each set may be unreadable, and one must be"
        f" readable; got {' and '.join(counts)} unreadable; mend or remove what is listed, or"
        " allow more with --max-bad",
        [bad for each in written for bad in each.skipped],
    )


def _store(
    source: Source, path: Path, how: Any, workers: int, report: Callable[[], None]
) -> Manifest:
    """Write a set to `path` and return its manifest."""
    content, labels, skipped, stored = ContentHash(source.classes, how.kind), [], [], Counter()
    groups: defaultdict[str, list[str]] = defaultdict(list)
    with closing(BetonWriter(path, capacity=len(source.items), kind=how.kind)) as writer:
        for item, result in encode_all(source.items, how, workers=workers):
            if isinstance(result, str):
                skipped.append({"image": str(item), "reason": result})
            else:
                try:
                    writer.add(result.payload, label=item.label, **result.attributes)
                except DataError as error:
                    raise DataError(f"{item}: {error}") from error
                content.add(result.payload, label=item.label, **result.attributes)
                labels.append(item.label)
                stored.update(result.counted)
                for by, group in result.groups.items():
                    groups[by].append(group)
            report()
        writer.finish()
    return manifests.describe(
        path,
        name=f"{source.name}.beton",
        content=content.hexdigest(),
        classes=source.classes,
        labels=labels,
        skipped=skipped,
        left_out=list(source.left_out),
        stored=dict(stored),
        groups=dict(groups),
        source=source.where,
        command=shlex.join(sys.argv),
        options=asdict(how),
        written_by={name: version(name) for name in ("spiketrain", "ffcv", "numpy", "pillow")},
    )


@contextmanager
def _whole_or_nothing(final: Path) -> Iterator[Path]:
    """Yield a temporary path.

    It is renamed to `final` if the block succeeds, and removed if it fails or is interrupted.

    Raises: DataError if the disk is full or cannot be written.
    """
    temporary = final.with_name(f".{final.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(final)
        sync_folder(final.parent)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise DataError(
            f"write: {final} {'does not fit the disk' if full else 'cannot be written'}:"
            f" {error.strerror}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
