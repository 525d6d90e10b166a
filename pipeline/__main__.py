"""The entry of the command line. It needs no extra, so that it can name one that is missing."""

import atexit
import logging
import os
import re
import sys
from importlib.metadata import requires
from typing import Any

from pipeline.core.stages import announce_imports

# Distributions in the extras whose module has another name.
PACKAGES = {"yaml": "pyyaml", "PIL": "pillow"}


def run() -> None:
    """Run the command line, then end the process without finalizing the interpreter.

    Freeing every module of torch, Ray and MLflow takes 2 to 4 s after a command's last line, and
    their native threads have aborted or hung in it. Functions registered with `atexit` run first.
    """
    code: Any = 1  # after an exception, which Python has printed

    def leave() -> None:
        logging.shutdown()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:  # the reader of the pipe is gone; 120 is Python's own code for that
            os._exit(code or 120)
        os._exit(code)

    atexit.register(leave)  # the function registered first runs last
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
        raise


def main() -> None:
    """Run the command line; a module of an extra that is not installed is one line and exit
    code 2.
    """
    announce_imports()
    try:
        from pipeline.cli.app import app, errors_in_one_line

        with errors_in_one_line():
            code = app(prog_name="spiketrain", standalone_mode=False)
            sys.exit(code if isinstance(code, int) else 0)
    except ModuleNotFoundError as error:
        extras = extras_with(error.name or "")
        if not extras:
            raise
        commands = " or ".join(f"pip install 'spiketrain[{extra}]'" for extra in extras)
        print(
            f"spiketrain: this command needs {error.name}, which is not installed: {commands}",
            file=sys.stderr,
        )
        sys.exit(2)


def extras_with(module: str) -> list[str]:
    """The extras of the installed spiketrain that install a module; none for any other module."""
    top = module.partition(".")[0]
    package = PACKAGES.get(top, top).replace("_", "-").lower()
    found = (
        re.match(r"([\w.-]+).*; .*\bextra == ['\"](\w+)['\"]", line)
        for line in requires("spiketrain") or ()
    )
    return [match[2] for match in found if match and match[1].lower() == package]


if __name__ == "__main__":
    run()
