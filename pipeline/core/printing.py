"""Tables and sentences for a terminal. Words are never cut; piped output has no width limit.

A table has as many columns as fit into the terminal. The other columns follow in further tables
below it, and each of these repeats the key columns (the run's name, the rule). A sentence is
wrapped between words. Text to be copied, such as a command, a path or a run's name, is never
broken. In a sentence that is longer than the terminal's width, it has a line of its own.
"""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text
from rich.theme import Theme

# The console's width if there is no terminal. Other code that prints on the console, such as a
# suite's report, wraps at this width.
NO_WIDTH = 10_000
# The only colour besides those of errors: it marks what can be typed. It is legible on black and on
# white. rich leaves it out if NO_COLOR is set.
ACCENT = "magenta"
_COMMAND = "spiketrain "  # the beginning of a text that can be typed
_THEME = Theme(  # rich's progress bars without its colours
    {
        **{f"bar.{part}": "none" for part in ("complete", "finished", "pulse")},
        "bar.back": "dim",
        **{f"progress.{part}": "none" for part in ("download", "elapsed", "remaining")},
    }
)
_GAP = "  "  # between columns
_PROSE_WIDTH = 28  # of a wrapped column in a terminal
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
    return Console(stderr=stderr, theme=_THEME, width=None if is_terminal else NO_WIDTH)


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
    """Print a sentence, wrapped between words. Commands that are never broken are coloured.

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
    commands = [
        part for part in (*whole, *re.findall("`([^`]*)`", text)) if part.startswith(_COMMAND)
    ]
    for line in _wrap(text, width - len(indent), whole):
        if cell_len(line) > width - len(indent):
            label.rstrip()
            if label.plain:
                _print(console, label)
            label = Text()
        shown = Text.assemble(label, (line, style))
        if commands:
            shown.highlight_words(commands, ACCENT)
        _print(console, shown)
        label = indent


def say_next(console: Console, commands: Iterable[str]) -> None:
    """Print the commands that the user can type next, each on a line of its own."""
    label = "next"
    for each in commands:
        say(console, each, label=f"{label:8}", whole=[each])
        label = ""


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
        rows: cells. A cell may have several lines, which piped output has side by side. A tab in a
            cell becomes a gap if one table holds all columns, otherwise a line break.
        title: the text above the first table.
        keys: the number of leading columns that each further table repeats.
    """
    if title:
        say(console, title, style="italic")
    table = [Column(each) if isinstance(each, str) else each for each in columns]
    texts = [list(row) for row in rows]
    if not has_width(console):
        texts = [[text.replace("\n", _GAP) for text in row] for row in texts]
    body, widths, parts = _laid_out(table, texts, keys, console, is_narrow=False)
    if len(parts) > 1:
        body, widths, parts = _laid_out(table, texts, keys, console, is_narrow=True)
    titles = [_wrap(each.title, width) for each, width in zip(table, widths, strict=True)]
    for number_of_part, part in enumerate(parts):
        if number_of_part:
            console.print()
        height = max(len(titles[index]) for index in part)
        heads = [[""] * (height - len(title)) + title for title in titles]  # aligned at the bottom
        for cells, style in ((heads, "bold"), *((row, "") for row in body)):
            for pieces in zip_longest(*(cells[index] for index in part), fillvalue=""):
                aligned = (
                    _align(piece, widths[index], table[index].align_right)
                    for piece, index in zip(pieces, part, strict=True)
                )
                _print(console, Text(_GAP.join(aligned).rstrip(), style))


def _laid_out(
    table: Sequence[Column],
    texts: Sequence[Sequence[str]],
    keys: int,
    console: Console,
    *,
    is_narrow: bool,
) -> tuple[list[list[list[str]]], list[int], list[list[int]]]:
    """The lines of each cell by row and column, the width of each column, and the tables' columns.

    If `is_narrow`, titles and wrapped columns are wrapped, and a tab is a line break.
    """
    body = [
        [
            [
                piece
                for line in text.replace("\t", "\n" if is_narrow else _GAP).split("\n")
                for piece in (_wrap_list(line) if is_narrow and each.wraps else [line])
            ]
            for text, each in zip(row, table, strict=True)
        ]
        for row in texts
    ]
    title_width = _longest_word if is_narrow else cell_len
    widths = [
        max(title_width(each.title), *(cell_len(line) for row in body for line in row[index]), 0)
        for index, each in enumerate(table)
    ]
    return body, widths, _parts(widths, keys, _console_width(console))


def _parts(widths: Sequence[int], keys: int, room: int) -> list[list[int]]:
    """The columns of each table: the keys, and as many others as fit, at least one."""
    parts = [[*range(keys)]]
    for index in range(keys, len(widths)):
        shown = [*parts[-1], index]
        width = sum(widths[each] for each in shown) + len(_GAP) * (len(shown) - 1)
        if width > room and len(parts[-1]) > keys:
            parts.append([*range(keys)])
        parts[-1].append(index)
    return parts


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


def _wrap_list(text: str) -> list[str]:
    """Wrap the text of a cell. An item between commas is broken only if it is too long."""
    items = [item for item in text.split(", ") if cell_len(item) < _PROSE_WIDTH]
    return _wrap(text, _PROSE_WIDTH, items)


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)


def _align(text: str, width: int, align_right: bool = False) -> str:
    space = " " * (width - cell_len(text))
    return space + text if align_right else text + space


def _print(console: Console, line: Text) -> None:
    """Print a line unchanged. Without `soft_wrap`, rich would fold words longer than a line."""
    console.print(line, soft_wrap=True)
