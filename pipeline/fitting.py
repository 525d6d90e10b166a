"""A micro-batch that fits: where a device's memory runs out, half as many samples are held at a time, and twice as many times.

The global batch stays. What comes out is the same but for the order of sums, unless something looks at a micro-batch as one, as
batch norm does: its statistics are then those of fewer samples.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.recipe import Recipe, Split, read_json, write_json
from pipeline.refused import Refused

FILE = "micro_batch.json"
"""in a run's folder, once memory ran out"""


class Smaller(Exception):
    """The run's only worker begins again, with a smaller micro-batch."""


def limit_of(run: Path) -> int | None:
    """The largest micro-batch that may still fit; None: memory has not run out.

    Raises:
        Refused: the file is damaged.
    """
    if not (run / FILE).exists():
        return None
    found = read_json(run / FILE)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise Refused(f"{run / FILE}: must hold a number of samples; got {found!r}")
    return found


def fitted(recipe: Recipe, limit: int | None) -> Recipe:
    """The recipe with micro-batches of at most so many samples."""
    sizes = [size for size in (limit, recipe.micro_batch) if size is not None]
    return replace(recipe, micro_batch=min(sizes, default=None))


def halve(run: Path, split: Split) -> int:
    """Note that not even `split.micro_batch` samples fit; how many are tried next.

    Raises:
        ValueError: one sample is too many; of several ranks the others do not know yet.
    """
    if split.micro_batch == 1:
        raise ValueError(
            "training: the device's memory runs out with one sample at a time; take a smaller network, or more memory"
        )
    write_json(run / FILE, split.micro_batch // 2)
    return split.micro_batch // 2
