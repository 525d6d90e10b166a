import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from pipeline.core.printing import (
    NO_WIDTH,
    Column,
    number,
    print_fields,
    print_table,
    prose,
    say,
    say_next,
)

RUN = "fashion-demo-sltt-1-tiny-20261129-183438-d598"


def printed(act, *args, width: int = NO_WIDTH, **about) -> list[str]:
    act(Console(file=(out := io.StringIO()), width=width), *args, **about)
    return out.getvalue().splitlines()


def test_columns_that_do_not_fit_stand_in_a_second_table_with_the_key_again():
    columns = ("run", number("top-1"), "state", "rule")
    rows = [("a-run", "9%", "finished", "SLTT"), ("b", "90%", "failed", "BPTT")]
    assert printed(print_table, columns, rows, width=22) == [
        "run    top-1  state",
        "a-run     9%  finished",
        "b        90%  failed",
        "",
        "run    rule",
        "a-run  SLTT",
        "b      BPTT",
    ]
    assert printed(print_table, columns, rows, width=28)[1] == "a-run     9%  finished  SLTT"


def test_a_header_is_wrapped_between_words_and_stands_at_the_bottom():
    columns = ("rule", number("peak saved"), number("images/s"))
    assert printed(print_table, columns, [("BPTT", "8 MB", "100")], width=22) == [
        "       peak",
        "rule  saved  images/s",
        "BPTT   8 MB       100",
    ]


def test_a_cell_has_several_lines_in_a_terminal_and_one_in_a_pipe():
    columns = ("rule", number("saved"), number("time"))
    rows = [("BPTT", "8 MB\t×1.00\n± 1 MB", "3 s\t×0.50")]
    assert printed(print_table, columns, rows, width=40)[1:] == [
        "BPTT  8 MB  ×1.00  3 s  ×0.50",
        "           ± 1 MB",
    ]
    assert printed(print_table, columns, rows)[1:] == ["BPTT  8 MB  ×1.00  ± 1 MB  3 s  ×0.50"]


def test_prose_in_a_column_is_wrapped_between_words():
    rows = [("SLTT", "its gradient is that of BPTT without time", "yes")]
    assert printed(print_table, ("rule", prose("claim"), "holds?"), rows, width=44) == [
        "rule  claim                         holds?",
        "SLTT  its gradient is that of BPTT  yes",
        "      without time",
    ]


def test_a_sentence_is_wrapped_between_words_and_a_command_in_one_piece():
    command = f"spiketrain resume {RUN}"
    text = f"not in the table: {RUN} (SLTT-1) is interrupted; {command}"
    assert printed(say, text, whole=[command]) == [text]
    assert printed(say, text, whole=[command], width=80) == [
        f"not in the table: {RUN} (SLTT-1) is",
        f"interrupted; {command}",
    ]
    assert printed(say, text, whole=[command], width=30) == [
        "not in the table:",
        RUN,
        "(SLTT-1) is interrupted;",
        command,
    ]
    assert printed(say, "see that `spiketrain sync` reaches it", width=16) == [
        "see that",
        "`spiketrain sync`",
        "reaches it",
    ]


def test_after_a_label_lines_are_indented_and_what_is_too_long_is_not():
    assert printed(say, "one two three", label="ok  ", width=12) == ["ok  one two", "    three"]
    assert printed(say, "/a/long/path", label="run ", width=12, whole=["/a/long/path"]) == [
        "run",
        "/a/long/path",
    ]


def test_only_commands_have_a_colour_unless_the_user_wants_none():
    def shown(**settings: bool) -> str:
        console = Console(
            file=(out := io.StringIO()),
            width=40,
            force_terminal=True,
            color_system="standard",
            **settings,
        )
        say(console, "MLflow is away: `spiketrain sync a` later", whole=["away:"])
        say_next(console, ["spiketrain compare a", "spiketrain export b"])
        return out.getvalue()

    def command(words: str) -> str:
        return f"\x1b[35m{words}\x1b[0m"

    assert shown() == (
        f"MLflow is away: `{command('spiketrain sync a')}`\nlater\n"
        f"next    {command('spiketrain compare a')}\n"
        f"        {command('spiketrain export b')}\n"
    )
    assert "\x1b" not in shown(no_color=True)


def test_an_item_of_a_list_stays_whole_and_a_later_table_has_no_empty_lines():
    columns = ("picture", "the class", prose("others"))
    cell = "Pullover 10.5, Ankle boot 10.4, Sneaker 10.4"
    assert printed(print_table, columns, [("a-picture.png", "Bag", cell)], width=30) == [
        "               the",
        "picture        class",
        "a-picture.png  Bag",
        "",
        "picture        others",
        "a-picture.png  Pullover 10.5,",
        "               Ankle boot 10.4,",
        "               Sneaker 10.4",
    ]


def test_names_and_values_stand_side_by_side():
    fields = {"rule": "SLTT", "model.neuron.surrogate.width": "a b"}
    assert printed(print_fields, fields) == [
        "rule                          SLTT",
        "model.neuron.surrogate.width  a b",
    ]
    assert printed(print_fields, fields, width=30) == [
        "rule  SLTT",
        "model.neuron.surrogate.width",
        "      a b",
    ]


_WORDS = st.lists(st.text("ab/-", min_size=1, max_size=30), max_size=4).map(" ".join)


@settings(deadline=None)
@given(data=st.data(), width=st.integers(20, 100), keys=st.integers(1, 2))
def test_no_word_is_broken(data: st.DataObject, width: int, keys: int):
    columns = [
        Column(title, wraps=True)
        for title in data.draw(st.lists(_WORDS, min_size=keys + 1, max_size=7))
    ]
    rows = data.draw(st.lists(st.tuples(*[_WORDS] * len(columns)), min_size=1, max_size=3))
    lines = printed(print_table, columns, rows, keys=keys, width=width)
    assert {word for line in lines for word in line.split()} == {
        word
        for cells in ([column.title for column in columns], *rows)
        for cell in cells
        for word in cell.split()
    }


@pytest.mark.parametrize("columns", ["80", None])
def test_a_terminals_width_is_kept_to_and_a_pipe_has_none(tmp_path: Path, columns: str | None):
    """Whatever the environment says of colours and columns."""
    program = (
        f"from pipeline.core.printing import new_console, say; say(new_console(), {'word ' * 40!r})"
    )
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("COLUMNS", None)
    if columns is not None:
        environment |= {"COLUMNS": columns, "FORCE_COLOR": "1"}
    words = [sys.executable, "-c", program]
    assert (
        subprocess.run(
            words, env=environment, capture_output=True, check=True, text=True
        ).stdout.count("\n")
        == 1
    )
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    subprocess.run(words, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, check=True)
    told = re.sub(rb"\x1b\[[0-9;]*m", b"", os.read(ours, 10_000)).decode().split("\r\n")
    for each in (ours, theirs):
        os.close(each)
    assert [len(line) for line in told] == [79, 79, 39, 0]
