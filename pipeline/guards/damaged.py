"""Data that was damaged, and what a run does without it.

At its start each machine compares every page of the files with its checksum, and while it trains some of those that it reads, or
all of them (`--verify full`): others in each epoch and evaluation, and always those of samples that cannot be decoded. A page
that cannot be read, on a bad sector, is a damaged one; where nothing else of its file can be read either, storage is away, and
the worker is started again.

    a damaged page of the training file        is left out from the newest checkpoint on: its samples have others of the epoch in
                                               their places, and no other sample moves (data/order.py)
    one more than `Recipe.max_damaged_pages`   ends the run, which names the page and the samples in it
    a page whose samples are evaluated on      likewise: a score on fewer samples can be compared with nobody's

What was once left out stays so, on all workers and in every attempt, even where the file has been mended; where the run's folder
is lost, what the newest checkpoint tells of (run/decided.py). With `--verify full` nothing is learnt from a damaged page;
otherwise batches between its damage and its next comparison may have been.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.data.base import Data
from pipeline.data.damage import DamagedPages, Page, told
from pipeline.data.errors import DataError
from pipeline.job import Job, Place
from pipeline.ranks import Ranks
from pipeline.recipe import Recipe, read_json, write_json
from pipeline.refused import Refused
from pipeline.tasks import build_data

__all__ = ["Damage", "LeftOut", "check_data", "find_damage"]

FILE = "damaged.json"
"""in a run's folder, once a page was left out"""


class LeftOut(Exception):
    """A worker met a damaged page, which is written down: all begin again at the newest checkpoint, and do without it."""


@dataclass(frozen=True)
class Damage:
    """What is left out so far."""

    pages: tuple[Page, ...] = ()

    @property
    def samples(self) -> tuple[tuple[int, int], ...]:
        """Of the training file, from one up to and without another."""
        return tuple(run for page in self.pages for run in page.samples)

    def after(self, found: Iterable[Page], *, most: int) -> Damage:
        """With what was found now; a page counts once, on however many machines it is damaged.

        Raises:
            DataError: more than `most` pages.
        """
        both = self.joined(Damage(tuple(found)))
        known = len(self.pages)
        if (new := both.pages[known:]) and len(both.pages) > most:
            left_out = f", and {known} are left out already" if known else ""
            raise DataError(f"data: {told(new)}; max_damaged_pages={most}{left_out}: restore the file")
        return both

    def joined(self, other: Damage) -> Damage:
        """The pages of both; one is known by its samples, wherever its file lies."""
        known = {page.samples for page in self.pages}
        new = {page.samples: page for page in other.pages if page.samples not in known}
        return Damage((*self.pages, *new.values()))

    @classmethod
    def of(cls, value: Any) -> Damage:
        """As `asdict` tells it, and JSON keeps it.

        Raises: KeyError, TypeError, ValueError: it is something else.
        """
        pages = [{**page, "samples": tuple((int(a), int(b)) for a, b in page["samples"])} for page in value["pages"]]
        return cls(tuple(Page(**page) for page in pages))

    @classmethod
    def read(cls, run: Path) -> Damage:
        if not (run / FILE).exists():
            return cls()
        value = read_json(run / FILE)
        try:
            return cls.of(value)
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(f"{run / FILE}: must hold pages and their samples; got {value!r}") from error

    def write(self, run: Path) -> None:
        write_json(run / FILE, asdict(self))


def find_damage(recipe: Recipe, job: Job, place: Place, ranks: Ranks) -> Damage:
    """What the run does without: what it did without before, and what any machine finds now; collective.

    Raises:
        Refused: more than the recipe allows, or other data than the run was launched on.
    """
    folder = Path(job.run)

    def found() -> tuple[Page, ...]:
        try:
            check_data(build_data(recipe), job, every_page=place.local_rank == 0)
        except DamagedPages as damaged:
            if not damaged.may_go:
                raise
            return damaged.pages
        return ()

    def noted() -> Damage:
        before = Damage.read(folder)
        damage = before.after(pages, most=recipe.max_damaged_pages)
        if damage != before:
            damage.write(folder)
        return damage

    pages = [page for each in ranks.each(ranks.together(found)) for page in each]
    return ranks.agree(noted)


def check_data(data: Data, job: Job, *, every_page: bool) -> None:
    """The data set's content against what the run was launched on, and every page against its checksum, once on a machine."""
    if data.fingerprint() != job.data_fingerprint:
        raise ValueError(
            f"data: this run was launched on content {job.data_fingerprint[:12]}; got {data.fingerprint()[:12]}: "
            "another file lies where the recipe points"
        )
    if every_page:
        data.check()
