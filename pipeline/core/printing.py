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

# The console's width if there is no terminal. Other code that prints on the console, such as a
# suite's report, wraps at this width.
NO_WIDTH = 10_000
_GAP = "  "  # between columns
_MAX_LINES = 3  # a wrapped column is at least as wide as its longest text divided by this
_MAX_MINIMUM = 28  # this minimum is never larger
_NO_BREAK = "\ue000"  # replaces a space that must not end a line


@dataclass(frozen=True)
class Column:
    """A column of a table. The title is wrapped between words; the values only if `wraps`."""

    title: str
    align_right: bool = False
    wraps: bool = False


def number(title: str) -> Column:
    return Column(title, align_right=True)


def prose(title: str) -> Column:
    return Column(title, wraps=True)


def new_console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr, as wide as the terminal.

    Without a terminal its width is `NO_WIDTH`, and the variable COLUMNS is ignored.
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
    width = _console_width(console)
    if label.cell_len > width // 2:
        text, label = label.plain + text, Text()
    indent = Text(" " * label.cell_len)
    for line in _wrap(text, width - len(indent), whole):
        if cell_len(line) > width - len(indent):
            label.rstrip()
            if label.plain:
                _print(console, label)
            label = Text()
        _print(console, Text.assemble(label, (line, style)))
        label = indent


def print_fields(console: Console, fields: Mapping[str, str]) -> None:
    """Print names and values in two columns.

    If a name is longer than half a line, its value is below it.
    """
    limit = _console_width(console) // 2
    width = max((cell_len(name) for name in fields if cell_len(name) <= limit), default=0)
    for name, value in fields.items():
        if cell_len(name) > width:
            _print(console, Text(name))
            name = ""
        say(console, value, label=_align(name, width) + _GAP)


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
        keys: the number of leading columns that each further table repeats. With two or more, a
            terminal shows a repeated value of the first column only once.
    """
    if title:
        say(console, title, style="italic")
    table_columns = [Column(each) if isinstance(each, str) else each for each in columns]
    texts = [list(row) for row in rows]
    line_break = "\n" if has_width(console) else _GAP
    # The first table has gaps in place of tabs. If it is too wide, the second has line breaks.
    for tab in (_GAP, "\n"):
        cells = [
            [text.replace("\t", tab).replace("\n", line_break) for text in row] for row in texts
        ]
        table = _Table(table_columns, cells, keys, _console_width(console))
        if len(table.parts) == 1 and not table.is_stacked:
            break
    for index, part in enumerate(table.parts):
        if index:
            console.print()
        for line in table.lines(part):
            _print(console, line)


class _Table:
    """The columns of each part of a table, and whether the keys are above the values.

    `_full`, `_unwrapped` and `_minimum` are lists with one width per column: if nothing is wrapped,
    if only its title is wrapped, and the minimum.
    """

    def __init__(
        self, columns: Sequence[Column], rows: Sequence[Sequence[str]], keys: int, width: int
    ) -> None:
        self._columns, self._rows, self._keys, self._width = columns, rows, keys, width
        cells_by_column = [
            (each, "\n".join(cells)) for each, *cells in zip(columns, *rows, strict=True)
        ]
        self._full = [
            max(cell_len(each.title), _longest_line(cells)) for each, cells in cells_by_column
        ]
        self._unwrapped = [
            max(_longest_word(each.title), _longest_line(cells)) for each, cells in cells_by_column
        ]
        self._minimum = [
            min(
                max(
                    _longest_word(f"{each.title} {cells}"),
                    min(math.ceil(unwrapped / _MAX_LINES), _MAX_MINIMUM),
                ),
                width - len(_GAP),
            )
            if each.wraps
            else unwrapped
            for (each, cells), unwrapped in zip(cells_by_column, self._unwrapped, strict=True)
        ]
        # The keys stand above the values in two cases. Either a column does not fit beside them. Or
        # they take more than half of the width, more than two tables are needed, and fewer with the
        # keys above.
        key_width = _sum_widths(self._minimum[:keys])
        beside = self._pack(width - key_width - len(_GAP))
        above = self._pack(width - len(_GAP))
        fits = key_width + len(_GAP) + max(self._minimum[keys:], default=0) <= width
        saves_tables = key_width > width // 2 and len(beside) > 2 and len(above) < len(beside)
        self.is_stacked = not fits or saves_tables
        self.parts = above if self.is_stacked else beside

    def _pack(self, room: int) -> list[list[int]]:
        """The columns without the keys, in order, with as many per part as fit."""
        parts: list[list[int]] = [[]]
        for index in range(self._keys, len(self._columns)):
            if (
                parts[-1]
                and _sum_widths(self._minimum[each] for each in (*parts[-1], index)) > room
            ):
                parts.append([])
            parts[-1].append(index)
        return parts

    def _widths(self, shown: Sequence[int], room: int) -> list[int]:
        """The width of each column: its full width if all columns fit, otherwise its minimum.

        In the second case the wrapped columns share the remaining width.
        """
        full, unwrapped, widths = (
            [of_column[index] for index in shown]
            for of_column in (self._full, self._unwrapped, self._minimum)
        )
        if _sum_widths(full) <= room:
            return full
        for _ in range(room - _sum_widths(widths)):
            narrow = max(range(len(shown)), key=lambda at: unwrapped[at] / max(1, widths[at]))
            widths[narrow] = min(widths[narrow] + 1, unwrapped[narrow])
        return widths

    def lines(self, part: Sequence[int]) -> Iterator[Text]:
        """The lines of one part: its titles, aligned at the bottom, and its rows."""
        indent = _GAP if self.is_stacked else ""
        shown = part if self.is_stacked else [*range(self._keys), *part]
        widths = self._widths(shown, self._width - len(indent))
        rights = [self._columns[index].align_right for index in shown]

        def lines_of(row: Sequence[str], *, at_bottom: bool = False) -> Iterator[str]:
            if self.is_stacked:
                yield from _wrap(_GAP.join(row[: self._keys]), self._width)
            blocks = [
                [piece for line in row[index].split("\n") for piece in _wrap(line, width)]
                for index, width in zip(shown, widths, strict=True)
            ]
            height = max(map(len, blocks), default=0) if at_bottom else 0
            blocks = [[""] * (height - len(block)) + block for block in blocks]
            for pieces in zip_longest(*blocks, fillvalue=""):
                yield (indent + _GAP.join(map(_align, pieces, widths, rights))).rstrip()

        for line in lines_of([each.title for each in self._columns], at_bottom=True):
            yield Text(line, "bold")
        is_terminal = self._width < sys.maxsize
        shares_keys = is_terminal and self._keys > 1 and not self.is_stacked
        first = None
        for row in self._rows:
            is_repeated = shares_keys and row[0] == first
            first = row[0]
            yield from map(Text, lines_of(["", *row[1:]] if is_repeated else row))


def _console_width(console: Console) -> int:
    return console.width if has_width(console) else sys.maxsize


def _wrap(text: str, width: int, whole: Iterable[str] = ()) -> list[str]:
    """Wrap a text between words. A word that is longer than the width has a line of its own."""
    for part in (*whole, *re.findall("`[^`]*`", text)):
        text = text.replace(part, part.replace(" ", _NO_BREAK))
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if lines[-1].strip() and cell_len(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [line.rstrip().replace(_NO_BREAK, " ") for line in lines]


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)


def _longest_line(text: str) -> int:
    return max(map(cell_len, text.split("\n")))


def _sum_widths(widths: Iterable[int]) -> int:
    """The total width of columns side by side, including the gaps."""
    widths = list(widths)
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _align(text: str, width: int, align_right: bool = False) -> str:
    space = " " * (width - cell_len(text))
    return space + text if align_right else text + space


def _print(console: Console, line: Text) -> None:
    """Print a line unchanged. Without `soft_wrap`, rich would fold words longer than a line."""
    console.print(line, soft_wrap=True)
