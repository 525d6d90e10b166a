"""The command lines of runs and suites that messages print for the user to type."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.run_folder import RunFolder
from pipeline.recipe import own_code
from pipeline.recipe.suite import FILE as SUITE

# A placeholder for the address of a Ray cluster, which the user must type: a folder must not decide
# which host receives the token.
ADDRESS = "ADDRESS"


def command(verb: str, folder: Path, *, address: str | None = None) -> str:
    """`spiketrain VERB NAME` for the folder of a run or suite, with all necessary options.

    The `--trust` words are only printed, never applied automatically. A folder may come from
    somebody else, so the user decides which packages to trust.
    """
    runs_words = (
        []
        if folder.parent.absolute() == Path("runs").absolute()
        else ["--runs", str(folder.parent)]
    )
    address_words = [] if address is None else ["--address", address]
    return shlex.join(
        [
            "spiketrain",
            verb,
            folder.name,
            *runs_words,
            *address_words,
            *trust_words(own_code.names(folder)),
        ]
    )


def how_to_resume(folder: Path) -> str:
    """`spiketrain resume NAME`, with `--address ADDRESS` if the launch was on a Ray cluster."""
    return command("resume", folder, address=ADDRESS if _was_on_a_cluster(folder) else None)


def trust_words(trust: Sequence[str]) -> list[str]:
    """The `--trust` words of a command."""
    return [word for package in trust for word in ("--trust", package)]


def _was_on_a_cluster(folder: Path) -> bool:
    suite = folder / SUITE
    try:
        cluster = (
            json.loads(suite.read_bytes())["cluster"]
            if suite.exists()
            else json.loads(RunFolder(folder).cluster.read_bytes())
        )
        return cluster["address"] is not None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # the file is damaged; a resume reports the damage
        return False
