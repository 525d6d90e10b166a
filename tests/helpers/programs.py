"""The programs beside the package that some tests need; infra/setup.sh installs them."""

import os
import shutil
from pathlib import Path

# Debian keeps daemons, and the programs of each release of PostgreSQL, in folders off PATH.
OFF_PATH = ("/usr/sbin", *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True))


def program(name: str) -> str:
    """The path of that program; a test fails without it."""
    found = shutil.which(name, path=os.pathsep.join((*OFF_PATH, os.environ["PATH"])))
    assert found, f"this test needs {name}: `infra/setup.sh --tools` or `--servers` installs it"
    return found
