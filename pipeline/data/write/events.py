"""Writes generated or published recordings to train.beton and val.beton, with their manifests."""

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from pipeline.core.errors import DataError, require_data
from pipeline.data.ffcv.manifest import Manifest
from pipeline.data.write.generated_events import CLASSES, MovingShape, Saccades
from pipeline.data.write.images import fashion
from pipeline.data.write.published_events import PUBLISHED, published_sets
from pipeline.data.write.recordings import Framing
from pipeline.data.write.writer import Existing, Progress, Source, check_kept, write_sets

Name = Literal["moving", "saccades", "nmnist", "cifar10dvs", "gesture", "ncaltech101"]
SLICES = {"moving": 10, "saccades": 6}  # the defaults of generated sets


def write_events(
    name: Name,
    out: Path,
    *,
    source: str | Path | None = None,
    slices: int | None = None,
    size: int | None = None,
    samples: int | None = None,
    val_samples: int | None = None,
    content_seed: int | None = None,
    workers: int = 1,
    max_bad: int = 0,
    progress: Progress | None = None,
    existing: Existing = "refuse",
    **framing: Any,
) -> list[Manifest]:
    """Write a data set of events as train.beton and val.beton.

    Args:
        source: for a published set, the folder that tonic fills (published_events.py); for
            saccades, "fashion" or the folder of its files.
        slices: default 10 (moving), 6 (saccades); a published set has no default.
        size: pixels a side; default 34 (generated), or the sensor's.
        samples, val_samples: numbers of generated recordings; default 6000 and 1600 (moving), or
            one per image (saccades).
        content_seed: selects the generated recordings; default 0.
        framing: `frames_by`, `resize`, `counts`, `overflow` of recordings.Framing.
        max_bad, existing: as in `write_sets`.

    Raises:
        DataError: an option is missing or has no effect, or recordings are unavailable; also as
            `write_sets`.
    """
    generated = {"samples": samples, "val_samples": val_samples, "content_seed": content_seed}
    if name in PUBLISHED:
        _refuse(name, "has its own recordings", **generated)
        if source is None or slices is None:
            raise DataError(
                f"write events: {name} needs a source, the folder that tonic fills, and slices; "
                f"got source={source}, slices={slices}"
            )
        sets = published_sets(name, Path(source))
        size = max(PUBLISHED[name].sensor) if size is None else size
    else:
        require_data(
            name in SLICES,
            f"write events: the set must be one of {', '.join(get_args(Name))}; got {name!r}",
        )
        _refuse(name, "is generated in the size asked for", resize=framing.get("resize"))
        counts = {key: value for key, value in generated.items() if value is not None}
        require_data(
            min(counts.get("samples", 1), counts.get("val_samples", 1)) >= 1,
            f"write events: samples and val_samples must be 1 or more; got {samples} and"
            f" {val_samples}",
        )
        slices = SLICES[name] if slices is None else slices
        size = 34 if size is None else size
        sets = (_moving if name == "moving" else _saccades)(source, size, **counts)
    written = write_sets(
        sets,
        Path(out),
        Framing(slices=slices, size=size, **framing),
        workers=workers,
        max_bad=max_bad,
        progress=progress,
        existing=existing,
    )
    check_kept(written, sets)
    return written


def _moving(
    source: str | Path | None,
    size: int,
    *,
    samples: int = 6000,
    val_samples: int = 1600,
    content_seed: int = 0,
) -> list[Source]:
    _refuse("moving", "is generated", source=source)
    where = f"moving shapes, content seed {content_seed}"
    train, val = (
        [MovingShape(number, part, size, content_seed) for number in range(count)]
        for part, count in enumerate((samples, val_samples))
    )
    return [Source("train", CLASSES, train, where), Source("val", CLASSES, val, where)]


def _saccades(
    source: str | Path | None,
    size: int,
    *,
    samples: int | None = None,
    val_samples: int | None = None,
    content_seed: int = 0,
) -> list[Source]:
    sets: list[Source] = []
    pictures = fashion(None if source in (None, "fashion") else Path(source))
    for part, (each, count) in enumerate(zip(pictures, (samples, val_samples), strict=True)):
        require_data(
            count is None or count <= len(each.items),
            f"write events: saccades: samples of {each.name} must be at most its"
            f" {len(each.items)} images; got {count}",
        )
        items = [
            Saccades(np.asarray(item.image), item.label, item.number, part, size, content_seed)
            for item in each.items[:count]
        ]
        where = f"saccades over {each.where}, content seed {content_seed}"
        sets.append(Source(each.name, each.classes, items, where))
    return sets


def _refuse(name: str, why: str, **given: Any) -> None:
    for option, value in given.items():
        require_data(
            value is None,
            f"write events: {option} has no effect: {name} {why}; got {option}={value}",
        )
