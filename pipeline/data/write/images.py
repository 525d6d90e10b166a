"""Writes samples to `train.beton` and `val.beton`, with a manifest beside each.

A file appears under its final name complete or not at all. Its bytes do not depend on the number of
workers.
"""

import errno
import os
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.core.errors import DataError
from pipeline.core.units import counted
from pipeline.data.ffcv import manifest as manifests
from pipeline.data.ffcv.format import BetonWriter
from pipeline.data.ffcv.manifest import ContentHash, Manifest
from pipeline.data.ffcv.page_checks import verify
from pipeline.data.write import sources
from pipeline.data.write.encode import Bad, Encoder, Encoding, S, encode_all

Existing = Literal["refuse", "replace", "keep"]
Progress = Callable[[int, int], None]  # samples done, samples in all, over both sets


def write_fashion(
    out: Path,
    *,
    workers: int = 1,
    source: Path | None = None,
    progress: Progress | None = None,
    existing: Existing = "refuse",
) -> list[Manifest]:
    """Write Fashion-MNIST, 60000 + 10000 grey images of 28x28, raw with three equal channels (FFCV
    stores only RGB).

    Args:
        source: a folder with its four files; None: Debian's package dataset-fashion-mnist, or
            torchvision's download.
        existing: "refuse" or "replace" existing files, or "keep" them after all their bytes were
            verified.

    Raises:
        DataError: no source, `out` is already written, or the disk is full.
        LoaderError: a worker died or hung.
    """
    sets, how = sources.fashion(source), Encoding(mode="raw")
    return write_sets(sets, Path(out), how, workers=workers, progress=progress, existing=existing)


def write_folder(
    source: Path,
    out: Path,
    *,
    mode: Literal["jpg", "raw", "mixed"] = "jpg",
    max_resolution: int | None = None,
    quality: int | None = None,
    jpg_share: float | None = None,
    workers: int = 1,
    max_bad: int = 0,
    progress: Progress | None = None,
    existing: Existing = "refuse",
) -> list[Manifest]:
    """Write images in ImageNet's layout: `source/train/<class>/*` and `source/val/<class>/*`.

    Args:
        mode: "jpg" keeps a JPEG that fits `max_resolution` and encodes the rest with `quality`;
            "raw" stores pixels; "mixed" stores the share `jpg_share` (0.5) as "jpg" does and the
            rest raw.
        max_resolution: pixels of the longer side; larger images are shrunk.
        max_bad: images of each set that may be unreadable. They are left out and listed in the
            manifest.
        existing: as in `write_fashion`.

    Raises:
        DataError: the classes differ, more images than `max_bad` are unreadable (after all images
            of both sets were tried), `out` is already written, or the disk is full.
        LoaderError: a worker died or hung.
    No file remains after an error.
    """
    if jpg_share is not None and mode != "mixed":
        raise DataError(
            f"write_folder: jpg_share has no effect in mode {mode!r}; leave it out or choose"
            " 'mixed'"
        )
    if quality is not None and mode == "raw":
        raise DataError(f"write_folder: quality has no effect in mode 'raw'; got {quality}")
    how = Encoding(
        mode=mode,
        max_resolution=max_resolution,
        quality=90 if quality is None else quality,
        jpg_share=0.5 if jpg_share is None else jpg_share,
    )
    sets = sources.image_folder(Path(source))
    return write_sets(
        sets, Path(out), how, workers=workers, max_bad=max_bad, progress=progress, existing=existing
    )


def write_sets(
    sets: Sequence[sources.Source[S]],
    out: Path,
    how: Encoder[S],
    *,
    workers: int = 1,
    max_bad: int = 0,
    progress: Progress | None = None,
    existing: Existing = "refuse",
) -> list[Manifest]:
    """Write each set to `out/<its name>.beton`, encoded by `how`. Arguments and errors as in
    `write_folder`.
    """
    if workers < 1 or max_bad < 0 or existing not in get_args(Existing):
        raise DataError(
            "write: workers must be 1 or more, max_bad 0 or more, existing 'refuse', 'replace' or"
            f" 'keep'; got workers={workers}, max_bad={max_bad}, existing={existing!r}"
        )
    finals = [out / f"{each.name}.beton" for each in sets]
    there = [str(final) for final in finals if final.exists()]
    if existing == "keep" and len(there) == len(finals):
        kept = [verify(final)[0] for final in finals]
        for manifest, final in zip(kept, finals, strict=True):
            if manifest.options != _options(how):
                raise DataError(
                    f"write: {final} was written with {manifest.options}; got {_options(how)}; ask"
                    " with --existing replace"
                )
        return kept
    if there and existing != "replace":
        raise DataError(
            f"write: {' and '.join(there)} must not exist yet; remove them, or ask with --existing"
            " replace"
        )
    out.mkdir(parents=True, exist_ok=True)
    total, done, stored = sum(len(each.items) for each in sets), 0, list[_Stored]()
    with ExitStack() as held:  # the files get their names together, once all are complete
        for each, final in zip(sets, finals, strict=True):

            def report(in_set: int, before: int = done) -> None:
                if progress is not None:
                    progress(before + in_set, total)

            path = held.enter_context(_whole_or_nothing(final))
            stored.append(_store(each, path, how, workers, report))
            done += len(each.items)
        _refuse_unreadable(sets, stored, kind=how.kind.name, max_bad=max_bad)
        written = [
            _described(each, found, final.name, how)
            for each, found, final in zip(sets, stored, finals, strict=True)
        ]
        for final in finals:
            # An old manifest must not vouch for a new file, nor a new one for an old file.
            final.with_name(final.name + manifests.SUFFIX).unlink(missing_ok=True)
    for manifest, final in zip(written, finals, strict=True):
        manifest.write(final.with_name(final.name + manifests.SUFFIX))
    return written


class TooManyUnreadable(DataError):
    """More unreadable samples than allowed. `unreadable` lists them, as `Manifest.skipped` does."""

    def __init__(self, message: str, unreadable: list[dict[str, str]]) -> None:
        super().__init__(message)
        self.unreadable = unreadable


def _refuse_unreadable(
    sets: Sequence[sources.Source[Any]], stored: Sequence["_Stored"], *, kind: str, max_bad: int
) -> None:
    counts = {each.name: len(found.skipped) for each, found in zip(sets, stored, strict=True)}
    unreadable = [bad for found in stored for bad in found.skipped]
    if max(counts.values()) > max_bad:
        got = " and ".join(f"{count} in {name}" for name, count in counts.items() if count)
        message = (
            f"write: at most {counted(max_bad, kind)} of each set may be unreadable; got {got}; "
            "mend or remove what is listed, or allow more with --max-bad"
        )
        raise TooManyUnreadable(message, unreadable)
    for each, found in zip(sets, stored, strict=True):
        if not found.labels:
            raise TooManyUnreadable(
                f"write: {each.name} must have a readable {kind}; got none", unreadable
            )


def check_kept(written: Sequence[Manifest], sets: Sequence[sources.Source[Any]]) -> None:
    """Check that kept files were written from the requested sets.

    Raises: DataError that names the samples of the files.
    """
    for manifest, each in zip(written, sets, strict=True):
        held = manifest.samples + len(manifest.skipped)
        if (held, manifest.source) != (len(each.items), each.where):
            raise DataError(
                f"write: {manifest.file} was written from {counted(held, 'sample')} of"
                f" {manifest.source}; got {len(each.items)} of {each.where}; ask with --existing"
                " replace"
            )


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """The samples of a set that were written to `path`."""

    path: Path
    content: str
    labels: list[int]
    skipped: list[dict[str, str]]
    counted: dict[str, int]
    groups: dict[str, list[str]]


def _store(
    source: sources.Source[S],
    path: Path,
    how: Encoder[S],
    workers: int,
    report: Callable[[int], None],
) -> _Stored:
    content, labels, skipped, counted = ContentHash(source.classes, how.kind), [], [], Counter()
    groups: defaultdict[str, list[str]] = defaultdict(list)
    with closing(BetonWriter(path, capacity=len(source.items), kind=how.kind)) as writer:
        for done, (item, result) in enumerate(encode_all(source.items, how, workers=workers), 1):
            if isinstance(result, Bad):
                skipped.append({"image": str(item), "reason": result.reason})
            else:
                try:
                    writer.add(result.payload, label=item.label, **result.attributes)
                except DataError as error:
                    raise DataError(f"{item}: {error}") from error
                content.add(result.payload, label=item.label, **result.attributes)
                labels.append(item.label)
                counted.update(result.counted)
                for by, group in result.groups.items():
                    groups[by].append(group)
            report(done)
        writer.finish()
    return _Stored(
        path=path,
        content=content.hexdigest(),
        labels=labels,
        skipped=skipped,
        counted=dict(counted),
        groups=dict(groups),
    )


def _described(
    source: sources.Source[Any], stored: _Stored, name: str, how: Encoder[Any]
) -> Manifest:
    """The manifest of a written set, whose final name is `name`."""
    return manifests.describe(
        stored.path,
        name=name,
        content=stored.content,
        classes=source.classes,
        labels=stored.labels,
        skipped=stored.skipped,
        left_out=[asdict(each) for each in source.left_out],
        stored=stored.counted,
        groups=stored.groups,
        source=source.where,
        command=shlex.join(sys.argv),
        options=_options(how),
        written_by={name: _version(name) for name in ("spiketrain", "ffcv", "numpy", "pillow")},
    )


@contextmanager
def _whole_or_nothing(final: Path) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to `final` if the block succeeds and removed if it
    fails or is interrupted.

    Raises: DataError if the disk is full or cannot be written.
    """
    temporary = final.with_name(f".{final.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, final)
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise DataError(
            f"write: {final} {'does not fit the disk' if full else 'cannot be written'}:"
            f" {error.strerror}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _options(how: Encoder[Any]) -> dict[str, Any]:
    """The fields of an encoder in the manifest, with lists for tuples, as in JSON."""
    assert is_dataclass(how) and not isinstance(how, type)
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(how).items()
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
