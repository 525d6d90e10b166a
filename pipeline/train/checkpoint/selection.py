"""Selects checkpoints of a store: the one to use, those to delete, and the one that must exist."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from pipeline.track.events import Checkpoint, Event, Quarantine, Start
from pipeline.train.checkpoint.manifest import find_damage
from pipeline.train.checkpoint.store import CheckpointError, CheckpointStore, trainer_of


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def pin(path: Path) -> None:
    """Protect a checkpoint in a local store from pruning, because others know its address."""
    path.with_name(f"{path.name.split('.')[0]}.pinned").touch()


def verified_checkpoint(store: CheckpointStore, which: str = "last") -> Path:
    """The folder of the newest checkpoint that verifies; with "best", of the one with the best
    score.

    Raises:
        CheckpointError: there is no such checkpoint.
        OSError: a checkpoint cannot be read now, and may be the one to return.
    """
    names = store.names()
    if which == "best":
        names = _by_score(store, names)
    for name in reversed(names):
        path = store.fetch(name)
        if find_damage(path) is None:
            return path
    with_score = " with a score" if which == "best" else ""
    raise CheckpointError(
        f"{store.address('')}: must hold a checkpoint{with_score} that verifies; got none"
    )


def prune(store: CheckpointStore, saved: str, *, keep: int) -> None:
    """Delete the folders that the checkpoint `saved` has replaced, and old checkpoints.

    The newest `keep` checkpoints, the best by score and the pinned ones stay. Checkpoints newer
    than `saved` belong to another attempt. They stay and do not count.

    Raises:
        CheckpointError: another driver owns the store.
        OSError: a checkpoint could not be deleted, or its score cannot be read now. Without all
            scores no old checkpoint is deleted, because any of them may be the best.
    """
    store.delete(saved, except_folder=store.folder_name(saved))
    names = [name for name in store.names() if name <= saved]
    if len(names) <= keep:
        return
    best = _by_score(store, names)[-1:]
    for name in names[:-keep]:
        if name not in best and not _is_pinned(store, name):
            store.delete(name)


def expected_step(events: Iterable[Event], *, keep: int) -> int | None:
    """The step of the newest checkpoint that must exist according to the journal; None if no
    checkpoint must exist.

    Each start event names the step of the newest checkpoint at that time. Of the checkpoints that
    were saved since, the newest `keep` exist, except those in quarantine.
    """
    existing: set[int] = set()
    for event in events:
        if isinstance(event, Start):
            existing = {step for step in {*existing, event.step} if 0 < step <= event.step}
        elif isinstance(event, Checkpoint):
            existing = set(sorted({*existing, event.step})[-keep:])
        elif isinstance(event, Quarantine):
            if name := re.match(r"step_(\d+)", PurePosixPath(event.path).name):
                # The save of this checkpoint deleted an older one. The journal may lack the save.
                step = int(name[1])
                existing = set(sorted({*existing, step})[-keep:]) - {step}
    return max(existing, default=None)


def _is_pinned(store: CheckpointStore, name: str) -> bool:
    try:
        store.read(f"{name}.pinned")
    except FileNotFoundError:
        return False
    return True


def _by_score(store: CheckpointStore, names: Sequence[str]) -> list[str]:
    """The names of the checkpoints that have a score in an intact trainer.json, the best last.

    Raises:
        OSError: a trainer.json cannot be read now, and may be intact.
    """
    scores = {name: trainer_of(store, name).get("score") for name in names}
    scored = [name for name in names if scores[name] is not None]
    return sorted(scored, key=lambda name: (scores[name], name))
