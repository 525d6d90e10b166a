"""Of the batches that the attempts at a run have trained: those of the history that survived, and
what is wrong with it.

A record tells of a batch, or of a part of one: the `time` at which it was trained (unix seconds),
its `step`, its `samples`. A start is the journal's event of that name: an attempt that began at the
time `began` with the weights that stood before `step`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def survived(records: Sequence[Record], starts: Sequence[Record]) -> list[Record]:
    """Without what was trained in vain: each start takes back every step from its own on that was
    trained before it began.

    So a step that an attempt should have trained again, and did not, is missing, though an attempt
    before it has trained it. Where two records of one step survive, one attempt has trained it
    twice.
    """

    def in_vain(record: Record) -> bool:
        return any(
            record["time"] < start["began"] and record["step"] >= start["step"] for start in starts
        )

    return [each for each in records if not in_vain(each)]


def wrong(
    records: Sequence[Record],
    starts: Sequence[Record],
    *,
    steps: int,
    batch_size: int,
    samples: int,
    workers: int,
) -> list[str]:
    """What does not hold of `steps` batches: that each of the `samples` of an epoch was in one of
    its batches, and in no other.

    `batch_size` is the global batch, of which each of the `workers` writes a record. Without
    augmentation and without a tail that is dropped: `samples` are so many whole batches.
    """
    told: dict[int, list[Record]] = {step: [] for step in range(steps)}
    for each in survived(records, starts):
        if each["step"] in told:
            told[each["step"]].append(each)
    missing = [step for step, of in told.items() if len({each["rank"] for each in of}) < workers]
    if missing:
        return [f"{len(missing)} steps were never trained, the first of them {missing[0]}"]
    per_epoch, found = samples // batch_size, []
    everything: set[str] | None = None
    for epoch in range(-(-steps // per_epoch)):
        mine = range(epoch * per_epoch, min(steps, (epoch + 1) * per_epoch))
        seen = Counter(name for step in mine for each in told[step] for name in each["samples"])
        doubled = sum(count - 1 for count in seen.values())
        lost = len(mine) * batch_size - len(seen)
        if len(mine) == per_epoch:
            everything = everything or set(seen)
        strangers = set(seen) - (everything or set(seen))
        if doubled or lost or strangers:
            found.append(
                f"epoch {epoch}: {doubled} doubled, {lost} lost, {len(strangers)} of no other epoch"
            )
    return found
