"""What other rules are compared with, by its name."""

from __future__ import annotations

BASELINE = "BPTT"


def is_baseline(rule: str, against: str = BASELINE) -> bool:
    """Whether `rule` is `against`, or BPTT that computes its gradient slice by slice: time is
    divided by the faster.
    """
    return rule == against or (against == BASELINE and rule.startswith(f"{BASELINE}-chunk-"))
