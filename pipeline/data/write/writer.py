"""Writes sets of samples to `train.beton` and `val.beton`, with a manifest beside each.

    take a source, encode its samples in one or several processes, store them in order, report

The files get their final names only when all are complete. Their bytes do not depend on the number
of workers.
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
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path
from signal import SIG_IGN, SIGINT, signal
from typing import Any, Literal, get_args

from pipeline.core.code_version import installed_version
from pipeline.core.errors import DataError, LoaderError, require_data
from pipeline.core.files import sync_folder
from pipeline.core.units import counted
from pipeline.data.ffcv import manifest as manifests
from pipeline.data.ffcv.format import BetonWriter
from pipeline.data.ffcv.manifest import ContentHash, Manifest
from pipeline.data.ffcv.page_checks import verify

CHUNK = 16  # samples in one task of a worker process
AHEAD = 32  # samples per worker process that are encoded ahead
Existing = Literal["refuse", "replace", "keep"]
Progress = Callable[[int, int], None]  # called with two numbers: samples done, samples of all sets


@dataclass(frozen=True)
class Source:
    """The samples of one set, in the order of the file."""

    name: str  # train or val
    classes: list[str]  # the position of a class name is its label
    items: Sequence[Any]  # the samples; each has a `label`, and `str` names it in error messages
    origin: str  # of the samples, for the manifest
    left_out: Sequence[dict[str, str]] = ()  # see Manifest


@dataclass(frozen=True)
class Encoded:
    payload: bytes
    attributes: dict[str, int]  # stored in the file beside the label (format.py)
    counts: dict[str, int]  # the sums over all samples are stored in the manifest
    groups: dict[str, str] = field(default_factory=dict)  # stored in the manifest for each sample


class TooManyUnreadable(DataError):
    """A set has more unreadable samples than allowed, or no readable one.

    `unreadable`: the unreadable samples of all sets, as in `Manifest.skipped`.
    """

    def __init__(self, message: str, unreadable: list[dict[str, str]]) -> None:
        super().__init__(message)
        self.unreadable = unreadable


def write_sets(
    sets: Sequence[Source],
    out: Path,
    encode: Any,
    *,
    workers: int = 1,
    max_unreadable: float = 0.0,
    progress: Progress | None = None,
    existing: Existing = "refuse",
) -> list[Manifest]:
    """Write each set to `out/<its name>.beton`.

    An error before all files are complete leaves existing files unchanged.

    Args:
        encode: a frozen dataclass. A call with a sample returns an `Encoded`, or the reason why the
            sample is unreadable. `encode.kind` is the kind of the file (format.py). The fields of
            the dataclass are stored in the manifest. Each worker process gets a copy.
        max_unreadable: the share of the samples of each set that may be unreadable. They are
            omitted and listed in the manifest.
        existing: "refuse" raises if a file exists. "replace" replaces existing files. "keep" writes
            the files if none exists, raises if only some do, and otherwise verifies and keeps them.

    Raises:
        TooManyUnreadable: after all samples of all sets were tried.
        DataError: an option is out of range, a file exists, a kept file is damaged or has other
            options or samples, or the disk is full or cannot be written.
        LoaderError: a worker process died or hung.
    """
    require_data(
        workers >= 1 and 0 <= max_unreadable <= 1 and existing in get_args(Existing),
        "write: workers must be 1 or more, max_unreadable a share in 0..1, existing 'refuse',"
        f" 'replace' or 'keep'; got workers={workers}, max_unreadable={max_unreadable},"
        f" existing={existing!r}",
    )
    files = [Path(out) / f"{source.name}.beton" for source in sets]
    existing_files = [str(file) for file in files if file.exists()]
    if existing == "keep" and len(existing_files) == len(files):
        return _verify_kept(files, sets, encode)
    require_data(
        not existing_files or existing == "replace",
        f"write: {' and '.join(existing_files)} must not exist yet; remove them, or use"
        " --existing replace",
    )
    Path(out).mkdir(parents=True, exist_ok=True)
    total, done = sum(len(source.items) for source in sets), count(1)
    report = lambda: progress(next(done), total) if progress else None
    manifest_paths = [file.with_name(file.name + manifests.SUFFIX) for file in files]
    with ExitStack() as stack:  # renames the files together, after all are complete
        written = [
            _store(source, stack.enter_context(_renamed_to(file)), encode, workers, report)
            for source, file in zip(sets, files, strict=True)
        ]
        _refuse_unreadable(written, max_unreadable)
        for path in manifest_paths:
            # A run that is killed before its end must not leave a manifest of another file.
            path.unlink(missing_ok=True)
    for manifest, path in zip(written, manifest_paths, strict=True):
        manifest.write(path)
    return written


def encode_all(
    items: Iterable[Any], encode: Any, *, workers: int, timeout_s: float = 300.0
) -> Iterator[tuple[Any, Encoded | str]]:
    """Encode in order, in `workers` processes, or in this process if `workers` is 1.

    The samples are encoded in batches of `AHEAD` per worker.

    Raises: LoaderError if a worker process dies, or a batch takes more than `timeout_s` seconds.
    """
    if workers == 1:
        yield from ((item, encode(item)) for item in items)
        return
    # Workers are spawned, because a fork would leave the threads of this process (torch, numba) in
    # an unknown state.
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=signal, initargs=(SIGINT, SIG_IGN)
    )
    samples, batch = iter(items), []
    try:
        while batch := list(islice(samples, AHEAD * workers)):
            yield from zip(
                batch, pool.map(encode, batch, chunksize=CHUNK, timeout=timeout_s), strict=True
            )
    except BrokenProcessPool as error:
        raise LoaderError(
            f"write: a worker process died while samples from {batch[0]} on were encoded"
        ) from error
    except TimeoutError as error:
        raise LoaderError(
            f"write: samples {batch[0]} to {batch[-1]} were not encoded within {timeout_s:g} s"
        ) from error
    finally:
        # CPython 3.11 to 3.13 have no public method to end a hanging worker; 3.14 has
        # terminate_workers().
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.kill()  # a stopped process would not receive SIGTERM
        pool.shutdown(wait=True, cancel_futures=True)


def _verify_kept(files: Sequence[Path], sets: Sequence[Source], encode: Any) -> list[Manifest]:
    kept = [manifest for file in files for manifest in verify(file)]
    for manifest, source in zip(kept, sets, strict=True):
        require_data(
            manifest.options == asdict(encode),
            f"write: {manifest.file} was written with {manifest.options}; got {asdict(encode)}; use"
            " --existing replace",
        )
        samples = manifest.samples + len(manifest.skipped)
        require_data(
            (samples, manifest.source) == (len(source.items), source.origin),
            f"write: {manifest.file} was written from {counted(samples, 'sample')} of"
            f" {manifest.source}; got {len(source.items)} of {source.origin}; use --existing"
            " replace",
        )
        found = Counter(item.label for item in source.items)
        by_class = [found[label] for label in range(len(source.classes))]
        require_data(
            manifest.classes == source.classes
            and (manifest.skipped or manifest.histogram == by_class),
            f"write: {manifest.file} must have the classes of {source.origin}, with as many samples"
            " of each; it has not; use --existing replace",
        )
    return kept


def _refuse_unreadable(written: Sequence[Manifest], max_unreadable: float) -> None:
    totals = [each.samples + len(each.skipped) for each in written]
    if all(
        each.samples and len(each.skipped) <= max_unreadable * total
        for each, total in zip(written, totals, strict=True)
    ):
        return
    counts = [
        f"{len(each.skipped)} of {total} in {each.file}"
        for each, total in zip(written, totals, strict=True)
    ]
    raise TooManyUnreadable(
        f"write: a share of at most {max_unreadable:g} of each set may be unreadable, and one"
        f" sample must be readable; got {' and '.join(counts)} unreadable; repair or remove the"
        " unreadable samples, or allow a larger share with --max-unreadable",
        [sample for each in written for sample in each.skipped],
    )


def _store(
    source: Source, path: Path, encode: Any, workers: int, report: Callable[[], None]
) -> Manifest:
    content, stored = ContentHash(source.classes, encode.kind), Counter()
    labels, skipped, groups = [], [], defaultdict(list)
    with closing(BetonWriter(path, capacity=len(source.items), kind=encode.kind)) as writer:
        for item, result in encode_all(source.items, encode, workers=workers):
            if isinstance(result, Encoded):
                try:
                    writer.add(result.payload, label=item.label, **result.attributes)
                except DataError as error:  # it does not fit a page
                    result = str(error)
            if isinstance(result, str):
                skipped.append({"image": str(item), "reason": result})
            else:
                content.add(result.payload, label=item.label, **result.attributes)
                labels.append(item.label)
                stored.update(result.counts)
                for grouping, group in result.groups.items():
                    groups[grouping].append(group)
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
        source=source.origin,
        command=shlex.join(sys.argv),
        options=asdict(encode),
        written_by={
            name: installed_version(name) for name in ("spiketrain", "ffcv", "numpy", "pillow")
        },
    )


@contextmanager
def _renamed_to(final: Path) -> Iterator[Path]:
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
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise DataError(
            f"write: {final} {'does not fit the disk' if is_full else 'cannot be written'}:"
            f" {error.strerror}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
