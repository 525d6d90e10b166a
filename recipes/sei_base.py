"""What the recipes of SEI-BWSNN share: two stages, and beside them what the rule is compared with."""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.bptt import BPTT
from pipeline.suite import Suite


def two_stages(first: Recipe, second: Recipe) -> Suite:
    """Full-precision weights, 1-bit weights that start from them, and the latter by BPTT: the row that SLTT is read against."""
    second = replace(second, init=f"@{first.name}")
    return Suite((first, second, replace(second, name=f"{second.name}-bptt", rule=spec(BPTT))))
