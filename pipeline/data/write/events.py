"""Writes generated or published recordings of event cameras as train.beton and val.beton."""

from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from pipeline.core.errors import DataError, require_data
from pipeline.data.ffcv.manifest import Manifest
from pipeline.data.write.generated_events import (
    CLASSES,
    FLASH_CLASSES,
    Flashes,
    MovingShape,
    Saccades,
)
from pipeline.data.write.images import fashion_sets
from pipeline.data.write.published_events import PUBLISHED, published_sets
from pipeline.data.write.recordings import Framing
from pipeline.data.write.writer import Existing, Progress, Source, write_sets

EventSet = Literal[
    "moving", "flashes", "saccades", "nmnist", "cifar10dvs", "gesture", "ncaltech101"
]
DEFAULT_SLICES = {"moving": 10, "flashes": 16, "saccades": 6}  # of the generated sets


def write_events(
    name: EventSet,
    out: Path,
    *,
    source: str | Path | None = None,
    slices: int | None = None,
    size: int | None = None,
    samples: int | None = None,
    val_samples: int | None = None,
    gap: int | None = None,
    content_seed: int | None = None,
    workers: int = 1,
    max_unreadable: float = 0.0,
    progress: Progress | None = None,
    existing: Existing = "refuse",
    **framing: Any,
) -> list[Manifest]:
    """Write a data set of events as train.beton and val.beton.

    Args:
        source: A published set needs the folder that tonic downloads to (published_events.py).
            Saccades take the folder of Fashion-MNIST's files. For saccades, None and "fashion"
            mean Debian's package, or torchvision's download if the package is not installed.
            "moving" and "flashes" take no source.
        slices: default 10 (moving), 16 (flashes) or 6 (saccades); a published set has no default.
        size: pixels a side; default 34 for a generated set, else the longer side of the sensor.
        samples, val_samples: the numbers of generated recordings; default 6000 and 1600 (moving,
            flashes), or one per image (saccades).
        gap: slices from the first flash to the second; default 4 (flashes alone).
        content_seed: selects the generated recordings; default 0.
        framing: `frames_by`, `resize`, `counts` and `overflow` of recordings.Framing.
        max_unreadable, existing: as in `write_sets`.

    Raises:
        DataError: an option is missing, out of range or has no effect, or recordings are
            unavailable; also as `write_sets`.
        LoaderError: as `write_sets`.
    """
    options = {"samples": samples, "val_samples": val_samples, "content_seed": content_seed}
    if name != "flashes":
        _refuse(name, "has no flashes", gap=gap)
    if name in PUBLISHED:
        _refuse(name, "has its own recordings", **options)
        if source is None or slices is None:
            raise DataError(
                f"write events: {name} needs a source, the folder that tonic downloads to, and"
                f" slices; got source={source}, slices={slices}"
            )
        sets = published_sets(name, Path(source))
        size = max(PUBLISHED[name].sensor) if size is None else size
    else:
        require_data(
            name in DEFAULT_SLICES,
            f"write events: the set must be one of {', '.join(get_args(EventSet))}; got {name!r}",
        )
        _refuse(name, "is generated in the requested size", resize=framing.get("resize"))
        require_data(
            name != "flashes" or framing.get("frames_by", "time") == "time",
            "write events: flashes need frames_by=time, because a flash lies in one slice of time;"
            f" got frames_by={framing.get('frames_by')}",
        )
        require_data(
            all(count is None or count >= 1 for count in (samples, val_samples))
            and 0 <= (content_seed or 0) < 2**63,
            "write events: samples and val_samples must be 1 or more, content_seed in 0..2^63-1;"
            f" got samples={samples}, val_samples={val_samples}, content_seed={content_seed}",
        )
        slices = DEFAULT_SLICES[name] if slices is None else slices
        size = 34 if size is None else size
        sets = _generated_sets(name, source, slices, size, gap, **options)
    return write_sets(
        sets,
        Path(out),
        Framing(slices=slices, size=size, **framing),
        workers=workers,
        max_unreadable=max_unreadable,
        progress=progress,
        existing=existing,
    )


def _generated_sets(
    name: EventSet,
    source: str | Path | None,
    slices: int,
    size: int,
    gap: int | None,
    *,
    samples: int | None,
    val_samples: int | None,
    content_seed: int | None,
) -> list[Source]:
    seed = content_seed or 0
    if name == "saccades":
        return _saccade_sets(source, size, (samples, val_samples), seed)
    _refuse(name, "is generated", source=source)
    if name == "moving":
        make, classes, kind = partial(MovingShape, size=size), CLASSES, "moving shapes"
    else:
        of_gap = {} if gap is None else {"gap": gap}
        make = partial(Flashes, size=size, slices=slices, **of_gap)
        classes, kind = FLASH_CLASSES, "flashes"
    train, val = (
        [make(number, part, content_seed=seed) for number in range(count)]
        for part, count in enumerate((samples or 6000, val_samples or 1600))
    )
    origin = f"{kind}, content seed {seed}"
    return [Source("train", classes, train, origin), Source("val", classes, val, origin)]


def _saccade_sets(
    source: str | Path | None, size: int, counts: tuple[int | None, int | None], content_seed: int
) -> list[Source]:
    sets: list[Source] = []
    image_sets = fashion_sets(None if source in (None, "fashion") else Path(source))
    for part, (images, count) in enumerate(zip(image_sets, counts, strict=True)):
        require_data(
            count is None or count <= len(images.items),
            f"write events: saccades: samples of {images.name} must be at most its"
            f" {len(images.items)} images; got {count}",
        )
        items = [
            Saccades(np.asarray(item.image), item.label, item.number, part, size, content_seed)
            for item in images.items[:count]
        ]
        sets.append(
            Source(
                images.name,
                images.classes,
                items,
                origin=f"saccades over {images.origin}, content seed {content_seed}",
            )
        )
    return sets


def _refuse(name: str, reason: str, **options: Any) -> None:
    for option, value in options.items():
        require_data(
            value is None,
            f"write events: {option} has no effect: {name} {reason}; got {option}={value}",
        )
