"""Scenes of stamps to train.beton and val.beton with their manifests."""

import hashlib
from itertools import chain
from pathlib import Path
from typing import Literal

from pipeline.data.errors import DataError
from pipeline.data.ffcv.manifest import Manifest
from pipeline.data.write.images import Existing, Progress, check_kept, write_sets
from pipeline.data.write.sources import Source
from pipeline.data.write.stamps.pictures import SHARE, Pictures, installed, parts
from pipeline.data.write.stamps.scenes import Rendering, Scene, ground_of, object_of, scenes


def write_stamps(
    out: Path,
    *,
    size: int = 160,
    split: int = 0,
    samples: int = 5200,
    val_samples: int = 1040,
    smallest: float = 0.5,
    content_seed: int = 0,
    source: Path | None = None,
    mode: Literal["jpg", "raw"] = "jpg",
    quality: int | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    existing: Existing = "refuse",
) -> list[Manifest]:
    """Scenes of 13 classes, `size` pixels a side: `samples` to train on, `val_samples` of other
    objects to evaluate on.

    `split`: which objects and grounds evaluate, 0, 1 or 2, or 3 to choose settings on
    (pictures.py). `smallest`: the least share of a scene's side that an object takes.
    `content_seed`: selects the scenes, not the split.
    `source`: what holds the packages' pictures; None: /usr/share.
    `mode`, `quality`: pixels stored as JPEG (quality 90) or raw. `existing`: as for
    `write_fashion`.

    Both manifests keep each scene's "object" and "ground": see `Beton.groups`.

    Raises: DataError for options that make no set, for a package that is missing and for a picture
    that cannot be read, before anything is written; what `write_sets` raises.
    """
    if mode == "raw" and quality is not None:
        raise DataError(f"write stamps: quality has no effect in mode 'raw'; got {quality}")
    if min(samples, val_samples) < 1 or not 0 <= content_seed < 2**63:
        raise DataError(
            "write stamps: samples and val_samples must be 1 or more, content_seed 0 to 2^63-1; "
            f"got samples={samples}, val_samples={val_samples}, content_seed={content_seed}"
        )
    how = Rendering(
        size=size,
        split=split,
        content_seed=content_seed,
        smallest=smallest,
        mode=mode,
        quality=quality or 90,
    )
    share = SHARE if source is None else Path(source).expanduser()
    pictures = installed(share)
    divided = parts(pictures, split)
    where = f"{share.absolute()}, pictures {_read_all(pictures, size)}"
    sets: list[Source[Scene]] = []
    for part, (name, chosen, count) in enumerate(
        zip(("train", "val"), divided, (samples, val_samples), strict=True)
    ):
        items = list(scenes(chosen, count, part=part, split=split, content_seed=content_seed))
        sets.append(Source(name, list(chosen.objects), items, where))
    written = write_sets(
        sets, Path(out), how, workers=workers, progress=progress, existing=existing
    )
    check_kept(written, sets)
    return written


def _read_all(pictures: Pictures, size: int) -> str:
    """Reads each picture once, before a file is begun, and names them all: 16 digits of the sha256
    of their names and bytes.
    """
    digest = hashlib.sha256()
    for read, some in (
        (object_of, chain(*pictures.objects.values())),
        (ground_of, pictures.grounds),
    ):
        for each in some:
            read(each, size)
            digest.update(each.name.encode() + hashlib.sha256(each.path.read_bytes()).digest())
    return digest.hexdigest()[:16]
