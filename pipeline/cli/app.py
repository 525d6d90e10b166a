"""All commands of the command line. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from pipeline.cli.doctor import add_doctor_command
from pipeline.cli.forecast import add_forecast_commands
from pipeline.cli.launch import add_launch_commands
from pipeline.cli.network import add_network_commands
from pipeline.cli.options import RUNS, Commands, Runs
from pipeline.cli.report import add_report_commands
from pipeline.cli.track import add_track_commands
from pipeline.cli.write import write_app
from pipeline.core.files import is_for_the_user
from pipeline.core.stages import say_stage
from pipeline.core.units import counted

app = Commands(
    name="spiketrain",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help=(
        "Train spiking neural networks by the rule a recipe names, and compare what it cost with"
        " BPTT."
    ),
    epilog="Example: spiketrain launch recipes/compare/fashion_demo.py --workers 2",
)
app.add_typer(write_app, name="write")

# typer 0.29 has its own copy of click; older releases import click.
usage_error: Any = typer.BadParameter.__mro__[1]


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the process on an error of the command inside. An error that the user can correct is one
    line on stderr and exit code 2.
    """
    try:
        yield
    except usage_error as error:
        where = error.ctx.command_path if error.ctx is not None else "spiketrain"
        print(f"{error.format_message()} (see {where} --help)", file=sys.stderr)
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except ValueError as error:
        _refuse(error, 2)
    except OSError as error:
        _refuse(error, 2 if is_for_the_user(error) else 1)
    except RuntimeError as error:
        if type(error).__module__.startswith("pipeline."):
            _refuse(error, 1)
        raise


def _refuse(error: Exception, code: int) -> NoReturn:
    print(" ".join(str(error).split()), file=sys.stderr)
    sys.exit(code)


add_launch_commands(app)
add_network_commands(app)
add_report_commands(app)
add_forecast_commands(app)


@app.command("runs", epilog="Example: spiketrain runs --runs /scratch/runs")
def runs_(runs: Runs = RUNS) -> None:
    """List suites and runs with their state and the command that resumes each."""
    from pipeline.report.listing import print_runs

    print_runs(runs)


@app.command(epilog="Example: spiketrain verify data/fashion")
def verify(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="a .beton file, or a folder of them")
    ],
) -> None:
    """Check every byte of FFCV files against their manifests."""
    from pipeline.data.ffcv.page_checks import verify as verify_files

    say_stage(f"reading every byte of {path}")
    for manifest in verify_files(path):
        counts = f"{counted(manifest.samples, 'sample')}, {counted(len(manifest.classes), 'class')}"
        print(f"{manifest.file}: {counts}, content {manifest.content[:16]}: whole")


add_track_commands(app)
add_doctor_command(app)
