"""The public names of `pipeline`, under the name of the project."""

from typing import TYPE_CHECKING, Any

import pipeline
from pipeline import __all__ as __all__

if TYPE_CHECKING:
    from pipeline import *  # noqa: F403


def __getattr__(name: str) -> Any:
    return getattr(pipeline, name)
