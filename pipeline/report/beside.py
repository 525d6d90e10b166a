"""What is measured for a report beside a run, once, and kept in a file of the run's folder.

A report that is made again, or elsewhere, shows what was measured then.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from pipeline.core.printing import say
from pipeline.recipe.recipe import write_json

T_ = TypeVar("T_")


def beside(
    file: Path,
    *,
    rests_on: Mapping[str, Any],
    measure: Callable[[], Any],
    told: Callable[[Any], T_],
    console: Console,
) -> T_ | None:
    """`told` of what `measure` has found, JSON values, which `file` keeps as long as it rests on
    the same.

    None, and a line that says why, where it is not there and cannot be measured here: where
    `measure` raises ValueError. Where the file can be neither read nor written, as on a read-only
    mount, nothing but that is lost.
    """
    try:
        kept = json.loads(file.read_text()) if file.exists() else None
        if kept is not None:
            if kept["rests_on"] == rests_on:
                return told(kept["found"])
            changed = [
                name for name, value in rests_on.items() if kept["rests_on"].get(name) != value
            ]
            say(console, f"{file}: of no use, for it is of another {' and '.join(changed)}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        say(console, f"{file}: of no use, for it is damaged, or of an earlier version: {error!r}")
    except OSError as error:
        say(console, f"{file}: of no use, for it cannot be read: {error.strerror}")
    try:
        found = measure()
    except ValueError as error:
        say(console, f"{file}: not measured: {error}")
        return None
    try:
        write_json(file, {"rests_on": rests_on, "found": found})
    except OSError as error:
        say(
            console,
            f"{file}: what was measured is not kept, and the next report does it anew:"
            f" {error.strerror}",
        )
    return told(found)
