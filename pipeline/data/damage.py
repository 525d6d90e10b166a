"""Pages of a .beton whose bytes are no longer those that were written, or cannot be read, and the samples in them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pipeline.data.errors import DataError

NAMED = 5  # pages, and runs of samples, that a line names


@dataclass(frozen=True)
class Fault:
    """What is wrong with bytes that were written: they are others now, or nobody can read them."""

    unreadable: str = ""  # what the medium says of that

    def told(self, parts: int = 1) -> str:
        """As a sentence about so many parts of a file goes on."""
        if self.unreadable:
            return f"cannot be read ({self.unreadable})"
        return f"{'differs' if parts == 1 else 'differ'} from its manifest"


@dataclass(frozen=True, kw_only=True)
class Page:
    file: str  # its path
    number: int
    offset: int  # bytes
    size: int  # bytes
    samples: tuple[tuple[int, int], ...]  # that lie in it, from one up to and without another
    unreadable: str = ""  # see Fault

    @property
    def count(self) -> int:
        """Samples in it."""
        return sum(end - first for first, end in self.samples)

    def __str__(self) -> str:
        named = [str(first) if end == first + 1 else f"{first} to {end - 1}" for first, end in self.samples]
        return f"page {self.number} (bytes {self.offset} to {self.offset + self.size - 1}, samples {_some(named)})"


class DamagedPages(DataError):
    """Pages that differ from their checksums, or cannot be read, while all else of their files is whole.

    `may_go`: a run can do without them, for nothing in them is evaluated on.
    """

    def __init__(self, pages: Sequence[Page], *, may_go: bool = True) -> None:
        self.pages, self.may_go = tuple(pages), may_go
        super().__init__(
            f"data: {told(pages)}" + ("" if may_go else "; samples that are evaluated on are in it: restore the file")
        )

    def __reduce__(self) -> tuple[Any, ...]:  # Ray sends it from a worker to the driver
        return _again, (self.pages, self.may_go)


def told(pages: Iterable[Page]) -> str:
    """Which pages of which files, in one line."""
    parts = []
    for (file, unreadable), group in groupby(pages, key=lambda page: (page.file, page.unreadable)):
        names = [str(page) for page in group]
        parts.append(f"{file}: {_some(names)} {Fault(unreadable).told(len(names))}: damaged")
    return "; ".join(parts)


def runs_of(numbers: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Ascending numbers as runs, from one up to and without another."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return tuple(runs)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _again(pages: tuple[Page, ...], may_go: bool) -> DamagedPages:
    return DamagedPages(pages, may_go=may_go)
