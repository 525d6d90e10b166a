"""What a checkpoint does with the files that a backend has captured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def write_captured(files: Mapping[str, Any], folder: Path) -> None:
    for name, state in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / name)
