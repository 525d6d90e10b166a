"""What a command is waited for, one line a stage on stderr; stdout holds the answer alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

_SLOW = ("torch", "ray", "mlflow")
"""packages that take seconds to import"""


def say_stage(stage: str) -> None:
    """Before a stage that may take seconds."""
    print(f"spiketrain: {stage} ...", file=sys.stderr, flush=True)


def announce_imports() -> None:
    """Say so before the first import that takes seconds, whichever command asks for it; nothing if
    it was made already.
    """
    if not any(name in sys.modules for name in _SLOW):
        sys.meta_path.insert(0, _Announcer())


class _Announcer(MetaPathFinder):
    """Is asked before every import, and leaves all of them to the other finders."""

    def __init__(self) -> None:
        self._is_said = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if fullname in _SLOW and not self._is_said:
            self._is_said = True
            say_stage(f"importing {fullname} and what else this command needs")
