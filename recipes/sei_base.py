"""What the recipes of SEI-BWSNN share: two stages, and beside them what the rule is compared
with.
"""

from dataclasses import replace
from typing import Any

from pipeline.models.transforms import binarized
from pipeline.recipe import Recipe, Suite, spec
from pipeline.rules.bptt import BPTT


def two_stages(first: Recipe, *, part: str, **changes: Any) -> Suite:
    """Full precision; 1-bit weights in a part of the network, from where that ended, at half its
    learning rate; the same by BPTT.

    The last is what SLTT is read against. Latent weights have no decay, as no 1-bit synapse's have.
    `changes` are fields of the second stage.
    """
    second = replace(
        first,
        name=first.name.replace("-fp", "-bw"),
        model=spec(binarized, network=first.model, part=part, weights="scaled"),
        optimizer=first.optimizer.with_(lr=first.optimizer.kwargs["lr"] / 2),
        init=f"@{first.name}",
        **changes,
    )
    return Suite((first, second, replace(second, name=f"{second.name}-bptt", rule=spec(BPTT))))
