"""What the journal knows of checkpoints, where none is found."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.checkpoint import lost_step


def start(step: int) -> dict[str, Any]:
    return {"event": "start", "step": step}


def saved(step: int) -> dict[str, Any]:
    return {"event": "checkpoint", "step": step, "path": f"/runs/run/checkpoints/step_{step:08d}"}


def quarantined(step: int, more: str = "") -> dict[str, Any]:
    return {"event": "quarantine", "path": f"s3://bucket/run/quarantine/step_{step:08d}{more}-20261127-031500-7-a", "reason": "r"}


@pytest.mark.parametrize(
    ("events", "step"),
    [
        ([], None),
        ([start(0), {"event": "step", "step": 2}], None),
        ([start(0), saved(3)], 3),
        ([start(0), saved(3), saved(6), start(6)], 6),
        ([start(8)], 8),  # adopted from a run whose folder was lost
        ([start(0), saved(3), quarantined(3)], None),
        ([start(0), saved(3), saved(6), quarantined(6, ".1")], 3),
        ([start(0), saved(3), saved(6), quarantined(6), quarantined(6)], 3),  # told once more by the start after a kill
        ([start(0), saved(3), saved(6), saved(9), quarantined(9), quarantined(6)], None),  # 3 was pruned
        ([start(0), saved(3), saved(6), quarantined(9), quarantined(6)], None),  # 9 died with its writer, 3 was pruned for it
        ([start(0), saved(3), quarantined(3), start(0), saved(3)], 3),
        ([start(0), saved(3), quarantined(3), start(0)], None),
        ([start(0), saved(3), saved(6), start(3)], 3),  # 6 had been moved away by hand, and the run went on
    ],
)
def test_one_must_be_there_unless_it_was_quarantined(events: list[dict[str, Any]], step: int | None) -> None:
    assert lost_step(events, keep=2) == step
