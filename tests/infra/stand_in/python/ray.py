"""Stands in for the package: the nodes that the stand-in of `ray start` says have joined."""

import os
from pathlib import Path

JOINED = Path(os.environ["STAND_IN"])


def init(**options: object) -> None:
    assert options["address"] == "auto" and os.environ["RAY_ADDRESS"]
    if not (JOINED / "joined.0").exists():
        raise ConnectionError("no head")


def nodes() -> list[dict[str, bool]]:
    return [{"Alive": True} for _ in JOINED.glob("joined.*")]
