"""Tables and sentences for a terminal. Words are never cut; piped output has no width limit.

A table has as many columns as fit into the terminal. The other columns follow in further tables
below it, and each of these repeats the key columns (the run's name, the rule). A sentence is
wrapped between words. Text to be copied, such as a command, a path or a run's name, is never
broken. If it is longer than the terminal's width, it has a line of its own.
"""

import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

NO_WIDTH = 10_000
"""the console's width if there is no terminal; other code that prints on the console, such as a
suite's report, wraps at this width
"""
_GAP = 2  # spaces between columns
_READABLE = 28  # the minimum width of a wrapped column with longer text
_LINES = 3  # the most lines of a wrapped cell with text shorter than _LINES times _READABLE
_KEPT = "\0"  # replaces a space that must not end a line


@dataclass(frozen=True)
class Column:
    """A column of a table. The title is wrapped between words; the values only if `wraps`."""

    title: str
    is_right: bool = False
    wraps: bool = False


def number(title: str) -> Column:
    return Column(title, is_right=True)


def prose(title: str) -> Column:
    return Column(title, wraps=True)


def new_console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr, as wide as the terminal.

    Without a terminal it has no width, whatever the environment says.
    """
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr) if is_terminal else Console(stderr=stderr, width=NO_WIDTH)


def has_width(console: Console) -> bool:
    return console.width < NO_WIDTH


def say(
    console: Console,
    text: str,
    *,
    label: str | Text = "",
    whole: Iterable[str] = (),
    style: str = "",
) -> None:
    """Print a sentence, wrapped between words.

    Args:
        label: text before the first line. The other lines are indented by its width, unless it is
            wider than half a line.
        whole: parts of the text that must not be broken, such as commands. Text between backticks
            is never broken.
    """
    label = Text(label) if isinstance(label, str) else label.copy()
    width = _width(console)
    if label.cell_len > width // 2:
        text, label = label.plain + text, Text()
    room = width - label.cell_len
    indent = Text(" " * label.cell_len)
    for line in _wrapped(text, room, whole):
        if cell_len(line) > room and label.cell_len:
            label.rstrip()
            if label.plain:
                _print(console, label)
            _print(console, Text(line, style))
        else:
            _print(console, Text.assemble(label, (line, style)))
        label = indent


def print_fields(console: Console, fields: Mapping[str, str]) -> None:
    """Print names and values in two columns. A value is below a name longer than half a line."""
    most = _width(console) // 2
    width = max((cell_len(name) for name in fields if cell_len(name) <= most), default=0)
    for name, value in fields.items():
        if cell_len(name) > width:
            _print(console, Text(name))
        label = _aligned("" if cell_len(name) > width else name, width)
        say(console, value, label=label + " " * _GAP)


def print_table(
    console: Console,
    columns: Sequence[str | Column],
    rows: Iterable[Sequence[str]],
    *,
    title: str = "",
    keys: int = 1,
) -> None:
    """Print a table. The columns that do not fit follow in further tables with the same keys.

    Args:
        columns: columns, or titles of text columns.
        rows: cells. A cell may have several lines, which are joined in piped output. A tab in a
            cell becomes a gap if one table holds all columns, otherwise a line break.
        title: the text above the first table.
        keys: the number of first columns that each further table repeats. With two or more, a
            terminal shows a repeated value of the first column only once.
    """
    if title:
        say(console, title, style="italic")
    rows = [list(row) for row in rows]
    table = _Table(columns, rows, keys, _width(console), side_by_side=True)
    parts, is_stacked = table.layout()
    if len(parts) > 1 or is_stacked:
        table = _Table(columns, rows, keys, _width(console), side_by_side=False)
        parts, is_stacked = table.layout()
    for index, part in enumerate(parts):
        if index:
            console.print()
        for line in table.stacked(part) if is_stacked else table.beside(part):
            _print(console, line)


class _Table:
    def __init__(
        self,
        columns: Sequence[str | Column],
        rows: Sequence[Sequence[str]],
        keys: int,
        width: int,
        *,
        side_by_side: bool,
    ) -> None:
        self._columns = [Column(each) if isinstance(each, str) else each for each in columns]
        self._has_width, self._width = width < sys.maxsize, width
        gap = " " * _GAP
        tab, line = (gap if side_by_side else "\n"), ("\n" if self._has_width else gap)
        self._rows = [[cell.replace("\t", tab).replace("\n", line) for cell in row] for row in rows]
        self._keys, self._others = list(range(keys)), list(range(keys, len(columns)))
        texts = [
            [column.title, *(row[index] for row in self._rows)]
            for index, column in enumerate(self._columns)
        ]
        self._whole = [max(map(_longest_line, of_column)) for of_column in texts]
        self._unwrapped = [
            max(_longest_word(title), *map(_longest_line, cells), 0) for title, *cells in texts
        ]
        self._least = [self._narrowest(index, of_column) for index, of_column in enumerate(texts)]

    def layout(self) -> tuple[list[list[int]], bool]:
        """The columns of each table, and whether each row's keys are above its values.

        They are if a column does not fit beside them. They also are if they take more than half of
        the width, and fewer tables are then needed.
        """
        taken = _total(self._least[index] for index in self._keys)
        room = self._width - taken - _GAP
        beside, above = self._packed(room), self._packed(self._width - _GAP)
        is_too_wide = any(self._least[index] > room for index in self._others)
        is_stacked = is_too_wide or (
            taken > self._width // 2 and len(beside) > 2 and len(above) < len(beside)
        )
        return (above, True) if is_stacked else (beside, False)

    def beside(self, part: list[int]) -> Iterator[Text]:
        shown = [*self._keys, *part]
        widths = self._widths(shown, self._width)
        yield from self._header(shown, widths)
        last = ""
        for row in self._rows:
            is_shared = self._has_width and len(self._keys) > 1 and row[0] == last
            last = row[0]
            yield from self._row(["", *row[1:]] if is_shared else row, shown, widths)

    def stacked(self, part: list[int]) -> Iterator[Text]:
        widths, indent = self._widths(part, self._width - _GAP), " " * _GAP
        key = (" " * _GAP).join(self._columns[index].title for index in self._keys)
        yield from (Text(line, "bold") for line in _wrapped(key, self._width))
        yield from self._header(part, widths, indent)
        for row in self._rows:
            yield from map(
                Text, _wrapped("  ".join(row[index] for index in self._keys), self._width)
            )
            yield from self._row(row, part, widths, indent)

    def _packed(self, room: int) -> list[list[int]]:
        """The columns without the keys, in order, with as many per table as fit."""
        parts: list[list[int]] = [[]]
        for index in self._others:
            if parts[-1] and _total(self._least[each] for each in (*parts[-1], index)) > room:
                parts.append([])
            parts[-1].append(index)
        return parts

    def _widths(self, shown: list[int], room: int) -> list[int]:
        """The width of each column: its full width if all columns fit, otherwise its minimum.

        In the second case the wrapped columns share the remaining width.
        """
        whole, unwrapped, widths = (
            [of[index] for index in shown] for of in (self._whole, self._unwrapped, self._least)
        )
        if _total(whole) <= room:
            return whole
        for _ in range(room - _total(widths)):
            growing = [at for at in range(len(shown)) if widths[at] < unwrapped[at]]
            if not growing:
                break
            widths[max(growing, key=lambda at: unwrapped[at] / widths[at])] += 1
        return widths

    def _narrowest(self, index: int, texts: list[str]) -> int:
        if not self._columns[index].wraps:
            return self._unwrapped[index]
        longest = max(map(_longest_word, texts))
        return min(
            max(longest, min(math.ceil(self._unwrapped[index] / _LINES), _READABLE)),
            self._width - _GAP,
        )

    def _header(self, shown: list[int], widths: list[int], indent: str = "") -> Iterator[Text]:
        """The titles, aligned at their bottom lines."""
        blocks = [
            _wrapped(self._columns[index].title, width)
            for index, width in zip(shown, widths, strict=True)
        ]
        height = max(map(len, blocks), default=0)
        blocks = [[""] * (height - len(block)) + block for block in blocks]
        yield from (Text(line, "bold") for line in self._lines(blocks, shown, widths, indent))

    def _row(
        self, row: Sequence[str], shown: list[int], widths: list[int], indent: str = ""
    ) -> Iterator[Text]:
        blocks = [
            [
                piece
                for line in row[index].split("\n")
                for piece in (_wrapped(line, width) if self._columns[index].wraps else [line])
            ]
            for index, width in zip(shown, widths, strict=True)
        ]
        yield from map(Text, self._lines(blocks, shown, widths, indent))

    def _lines(
        self, blocks: list[list[str]], shown: list[int], widths: list[int], indent: str
    ) -> Iterator[str]:
        rights = [self._columns[index].is_right for index in shown]
        for pieces in zip_longest(*blocks, fillvalue=""):
            cells = (_aligned(*each) for each in zip(pieces, widths, rights, strict=True))
            yield (indent + (" " * _GAP).join(cells)).rstrip()


def _width(console: Console) -> int:
    return console.width if has_width(console) else sys.maxsize


def _wrapped(text: str, width: int, whole: Iterable[str] = ()) -> list[str]:
    """Wrap a text between words. A word that is longer than the width has a line of its own."""
    for part in (*whole, *re.findall("`[^`]*`", text)):
        text = text.replace(part, part.replace(" ", _KEPT))
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if lines[-1].strip() and cell_len(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [line.rstrip().replace(_KEPT, " ") for line in lines]


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)


def _longest_line(text: str) -> int:
    return max(map(cell_len, text.split("\n")))


def _total(widths: Iterable[int]) -> int:
    """The total width of columns side by side, including the gaps."""
    widths = list(widths)
    return sum(widths) + _GAP * (len(widths) - 1)


def _aligned(text: str, width: int, is_right: bool = False) -> str:
    space = " " * (width - cell_len(text))
    return space + text if is_right else text + space


def _print(console: Console, line: Text) -> None:
    """Print a line unchanged. Without `soft_wrap`, rich would fold words longer than a line."""
    console.print(line, soft_wrap=True)
