"""Which pictures train and which evaluate: splits whose evaluation sets share no object and no ground.

Of the n objects of a class, in the order of a hash of their names, split s = 0, 1, 2 evaluates on numbers s q to (s + 1) q - 1,
with q = round(n / 4), and trains on all others; likewise the grounds. So every class stands in both parts of each split, and the
three evaluation sets together hold about three quarters of all objects, each once. Neither seed nor number of scenes changes it.

Split 3 is there to choose settings on. It evaluates on what is left, numbers 3 q to n - 1, with which all three train: whoever
chooses by it has seen no answer about a picture that they are tested on.
"""

from collections.abc import Sequence

import xxhash

from pipeline.data.errors import DataError
from pipeline.data.stamps.pictures import Picture, Pictures

SPLITS = 3
CHOICE = 3
"""the split to choose settings on"""
SHARE = 4  # one picture in so many evaluates


def parts(pictures: Pictures, split: int) -> tuple[Pictures, Pictures]:
    """(to train on, to evaluate on).

    Raises: DataError for an unknown split, and for a class that has too few objects.
    """
    if not 0 <= split <= CHOICE:
        raise DataError(f"write stamps: split must be in 0..{CHOICE}; got {split}")
    both = {name: _divided(name, found, split) for name, found in pictures.objects.items()}
    train_grounds, val_grounds = _divided("grounds", pictures.grounds, split)
    return (
        Pictures({name: train for name, (train, _) in both.items()}, train_grounds),
        Pictures({name: val for name, (_, val) in both.items()}, val_grounds),
    )


def _divided(what: str, pictures: Sequence[Picture], split: int) -> tuple[list[Picture], list[Picture]]:
    if len(pictures) < SHARE:
        raise DataError(f"write stamps: {what} must have {SHARE} pictures or more to be divided; got {len(pictures)}")
    ordered = sorted(pictures, key=lambda picture: xxhash.xxh3_64_intdigest(picture.name.encode()))
    held = round(len(ordered) / SHARE)
    val = ordered[split * held : None if split == CHOICE else (split + 1) * held]
    if not val:
        raise DataError(f"write stamps: {what} must have pictures that no other split evaluates on; got {len(pictures)}")
    return [each for each in ordered if each not in val], val
