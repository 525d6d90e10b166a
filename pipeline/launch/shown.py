"""What a person sees of one run while it trains: its journal, read as it grows. Nothing that happens here ends the training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from pipeline.launch.watch import Watch
from pipeline.printing import say
from pipeline.track.jsonl import Event, Follower


class Shown:
    """Shows, at each `look`, what has come to the journal in `folder` since the last; from where it stands now.

    `store`, `resume_command` and `name` are `Watch`'s. `also` is handed the same events.
    """

    def __init__(
        self,
        folder: Path,
        console: Console,
        *,
        store: str,
        resume_command: str = "",
        name: str = "",
        also: Callable[[list[Event]], None] = lambda events: None,
    ) -> None:
        self._say, self._also = partial(say, console), also
        journal = folder / "journal.jsonl"
        self._follower = Follower(journal, offset=journal.stat().st_size if journal.exists() else 0)
        self._watch = Watch(console, run_dir=folder, store=store, resume_command=resume_command, name=name)
        self._is_blind = self._is_broken = False

    def look(self) -> None:
        try:
            events = self._follower.poll()
        except OSError as error:  # storage that is away for a moment
            if not self._is_blind:
                self._say(f"the journal cannot be read ({error.strerror or error}): looked for again, and training goes on")
            self._is_blind = True
            return
        self._is_blind = False
        if self._is_broken:
            return
        try:
            self._watch.show(events)
            self._also(events)
        except Exception as error:  # a mistake of ours in what is shown must not cost what is trained
            self._is_broken = True
            self._say(f"shown no more ({type(error).__name__}: {error}): training goes on, and its journal has everything")

    def close(self) -> None:
        self.look()
        self._watch.close()
