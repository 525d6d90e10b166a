"""Progress of a command: a line on stderr before each slow stage. stdout has only the result."""

import sys
import textwrap
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from shutil import get_terminal_size
from types import ModuleType

_SLOW = ("torch", "ray", "mlflow")  # packages that take seconds to import


def say_stage(stage: str) -> None:
    """Announce a stage that may take seconds."""
    text = f"spiketrain: {stage} ..."
    if sys.stderr.isatty():  # a terminal would break words
        text = textwrap.fill(
            text,
            get_terminal_size().columns,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    print(text, file=sys.stderr, flush=True)


def announce_imports() -> None:
    """Announce the first import that takes seconds, unless one has already happened."""
    if not any(name in sys.modules for name in _SLOW):
        sys.meta_path.insert(0, _Announcer())


class _Announcer(MetaPathFinder):
    """An import hook that Python calls before every import. It leaves imports to other finders."""

    has_announced = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if fullname in _SLOW and not self.has_announced:
            self.has_announced = True
            say_stage(f"importing {fullname} and other packages that this command needs")
