"""The entry point of the command line. It needs no extra, so it can name a missing extra."""

import atexit
import gc
import logging
import os
import re
import sys
from importlib.metadata import requires
from typing import Any

from pipeline.core.stages import announce_imports

# The distribution of a module, where the two have different names.
_DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "cv2": "opencv-python"}


def run() -> None:
    """Run the command line, then end the process without finalizing the interpreter.

    With torch, Ray and MLflow, finalizing takes 2 to 4 s, and native threads can abort or hang
    during it. Functions registered with `atexit` run first.
    """
    # Imports make a million objects that stay. Full collections took a sixth of an import's time.
    gc.set_threshold(700, 10, 1000)
    code: Any = 1  # after an exception, which Python has printed

    def leave() -> None:
        logging.shutdown()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:  # the reader closed the pipe; Python itself then exits with 120
            os._exit(code or 120)
        os._exit(code)

    atexit.register(leave)  # the function registered first runs last
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
        raise


def main() -> None:
    """Run the command line. If an extra is not installed, print one line and exit with code 2."""
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
    """The extras of the installed spiketrain that install a module; may be empty."""
    top = module.partition(".")[0]
    distribution = _DISTRIBUTIONS.get(top, top).replace("_", "-").lower()
    matches = (
        re.match(r"([\w.-]+).*; .*\bextra == ['\"](\w+)['\"]", line)
        for line in requires("spiketrain") or ()
    )
    return [match[2] for match in matches if match and match[1].lower() == distribution]


if __name__ == "__main__":
    run()
