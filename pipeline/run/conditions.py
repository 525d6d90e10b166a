"""Under which conditions a run's figures hold, read off what was built: a reader should not have to
trust a recipe's silence.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from pipeline.recipe import Recipe
from pipeline.rules.base import Rule
from pipeline.run.settle import exactness
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm, foreign_norms


def conditions(
    network: nn.Module, rule: Rule, recipe: Recipe, device: torch.device
) -> dict[str, str | int]:
    """For a summary; `none` where the network has no such part, and `a, b` where it has parts of
    several kinds.

    `norm_over` of a norm that is not this project's is "time" with its class, as it sees time steps
    folded into the batch. `steps_per_forward` is T for what is folded over time, 1 for what goes
    step by step. `exact`: see `exactness`."""
    modules = list(network.modules())
    return {
        "reset_gradient": _kinds(
            module.reset_gradient for module in modules if isinstance(module, LIF)
        ),
        "norm_over": _kinds(
            [module.over for module in modules if isinstance(module, BatchNorm)]
            + [f"time ({type(norm).__name__})" for norm in foreign_norms(network).values()]
        ),
        "precision": recipe.precision,
        "exact": exactness(device),
        "steps_per_forward": min(rule.chunk or recipe.time_steps, recipe.time_steps),
    }


def _kinds(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values))) or "none"
