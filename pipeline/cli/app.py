"""All commands of the command line. Nothing heavy is imported before a command runs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer import rich_utils

from pipeline.cli import forecast, launch, network, new, report, track, write
from pipeline.cli.options import Commands, example
from pipeline.core.files import is_for_the_user
from pipeline.core.printing import ACCENT

app = Commands(
    name="spiketrain",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help=(
        "Train spiking neural networks with the learning rule of a recipe, and compare the"
        " rule's cost with BPTT."
    ),
    epilog=example("spiketrain new mine", "spiketrain launch compare/fashion_demo --workers 2"),
)
for group in (new, launch, report, write, network, forecast, track):
    app.add_typer(group.commands)
# In the help, only what can be typed has a colour.
_PLAIN = ("TYPES", "USAGE", "NEGATIVE_OPTION", "OPTION_ENVVAR", "REQUIRED_SHORT", "REQUIRED_LONG")
_TYPED = ("OPTION", "SWITCH", "COMMANDS_TABLE_FIRST_COLUMN")
for name, style in (dict.fromkeys(_PLAIN, "") | dict.fromkeys(_TYPED, ACCENT)).items():
    setattr(rich_utils, f"STYLE_{name}", style)

# typer 0.29 has its own copy of click; older releases import click.
usage_error: Any = typer.BadParameter.__mro__[1]


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the process on an error of the command in the block, with one line on stderr.

    The exit code is 2 for an error that the user can correct, and 1 for storage that fails and for
    spiketrain's own RuntimeErrors. An interruption ends the process with exit code 130, without a
    line. Any other error leaves the block.
    """
    try:
        yield
    except usage_error as error:
        command = error.ctx.command_path if error.ctx is not None else "spiketrain"
        print(f"{error.format_message()} (see {command} --help)", file=sys.stderr)
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except ValueError as error:
        _exit(error, 2)
    except OSError as error:
        _exit(error, 2 if is_for_the_user(error) else 1)
    except RuntimeError as error:
        if type(error).__module__.startswith("pipeline."):
            _exit(error, 1)
        raise


def _exit(error: Exception, code: int) -> NoReturn:
    print(" ".join(str(error).split()), file=sys.stderr)
    sys.exit(code)
