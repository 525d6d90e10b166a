"""A micro-batch that fits: where a device's memory runs out, half as many samples are held at a
time, and twice as many times.

The global batch stays. What comes out is the same but for the order of sums, unless something looks
at a micro-batch as one, as batch norm does: its statistics are then those of fewer samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.run_folder import RunFolder
from pipeline.recipe.recipe import Recipe, Split, read_json, write_json
from pipeline.track.events import Smaller, Start
from pipeline.track.journal import last_event


class HalveMicroBatch(Exception):
    """The run's only worker begins again, with a smaller micro-batch."""


def limit_of(run: Path) -> int | None:
    """The largest micro-batch that may still fit; None: memory has not run out.

    Raises:
        UserError: the file is damaged.
    """
    file = RunFolder(run).micro_batch
    if not file.exists():
        return None
    found = read_json(file)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise UserError(f"{file}: must hold a number of samples; got {found!r}")
    return found


def untold(run: Path) -> int | None:
    """The largest micro-batch that may still fit, where the journal knows of larger ones alone;
    else None.

    Of several workers the one whose memory ran out has died of it, and another holds the journal:
    the next attempt tells."""
    limit = limit_of(run)
    if limit is None:
        return None
    known = last_event(RunFolder(run).journal, Start, Smaller)
    return limit if known is not None and limit < known.micro_batch else None


def fitted(recipe: Recipe, limit: int | None) -> Recipe:
    """The recipe with micro-batches of at most so many samples."""
    sizes = [size for size in (limit, recipe.micro_batch) if size is not None]
    return replace(recipe, micro_batch=min(sizes, default=None))


def halve(run: Path, split: Split, *, split_of: Callable[[int], Split]) -> int:
    """Note that not even `split.micro_batch` samples fit; how many are tried next: half of them, or
    the next fewer that may be.

    `split_of` tells how the batch falls on the workers in micro-batches of at most so many samples;
    it raises ValueError where the recipe takes none of that size.

    Raises:
        ValueError: one sample is too many, or no fewer may be taken, and nothing is noted; of
            several ranks the others do not know yet.
    """
    had, refusal = split.micro_batch, None
    for samples in range(had // 2, 0, -1):
        try:
            is_one = split_of(samples).micro_batch == samples  # or the batch does not divide by it
        except ValueError as error:
            refusal = refusal or error  # of the largest
            continue
        if is_one:
            write_json(RunFolder(run).micro_batch, samples)
            return samples
    held = "one sample" if had == 1 else f"{had} samples"
    why = f", and fewer cannot be taken: {refusal}" if refusal else ""
    raise ValueError(
        f"training: the device's memory runs out with {held} at a time{why}; take a smaller"
        " network, or more memory"
    ) from refusal
