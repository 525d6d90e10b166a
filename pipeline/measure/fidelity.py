"""How far a rule's gradient is from that of BPTT, layer by layer: g_w the gradient of a synapse's
weight on one batch.

    cosine(rule)     g_rule . g_BPTT / (|g_rule| |g_BPTT|)      the mean over its draws; 0 where it
                                                                gives nothing, -1 where what it
                                                                gives is not finite
    temporal share   |g_BPTT - g_SLTT| / |g_BPTT|               what reaches the weight through time

Both are of one batch at the weights as they are: they say what a rule drops there, not what it
learns in the end."""

# T time, B batch

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from pipeline.rules.base import LossOf, OverTime, Rule, World
from pipeline.spiking.dropout import Dropout
from pipeline.spiking.synapse import Conv2d, Linear

Gradients = Mapping[str, Tensor]
"""by the name of a synapse"""


def gradients(
    network: nn.Module,
    rule: Rule,
    x_TB: Tensor,
    loss_for: Callable[[], LossOf],
    *,
    world: World = World(),
    over_time: OverTime = "steps",
    learnt: Mapping[str, Tensor] | None = None,
    step: int = 0,
    batches: int = 1,
) -> dict[str, Tensor]:
    """What `rule` gives the weight of every synapse of a copy of `network` on one batch, in order
    of registration.

    Dropout is off: BPTT draws it layer by layer and an online rule step by step, so that no seed
    makes them agree. The generators are seeded alike for whatever else draws. What the rule draws,
    it draws with the seed of `world` for batch `step`. One that learns by itself, as OPZO its
    matrices, begins with `learnt`, the state dict of a rule that trains (None: with nothing), sees
    the batch `batches` times, and is asked the last time. `loss_for()` is a fresh loss for each.

    Raises: ValueError where the rule refuses the network.
    """
    network = copy.deepcopy(network)
    rule.attach(network, world=world, over_time=over_time)
    if learnt is not None:
        rule.load_state_dict(learnt)
    for module in network.modules():
        if isinstance(module, (_DropoutNd, Dropout)):
            module.eval()
    device = x_TB.device
    try:
        for index in range(step, step + batches):
            network.zero_grad()
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(world.seed)
                for objective in rule.loss_terms(network, x_TB, loss_for(), step=index):
                    if objective.backward is not None:
                        objective.backward.backward()
            rule.end_of_batch()
    finally:
        rule.release()
    synapses = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, (Linear, Conv2d))
    }
    return {
        name: torch.zeros_like(w) if (w := module.weight).grad is None else w.grad
        for name, module in synapses.items()
    }


@dataclass(frozen=True)
class Fidelity:
    """Of each synapse, by name; NaN where BPTT's gradient is 0 or not finite."""

    temporal_share: dict[str, float]
    cosines: dict[str, dict[str, float]]
    """by the label of a rule"""

    @property
    def layers(self) -> list[str]:
        """The synapses; none where BPTT was compared with nothing."""
        return list(next(iter(self.cosines.values()), {}))

    @property
    def comparable(self) -> list[str]:
        """The synapses that BPTT gives a finite gradient that is not 0; the same for every rule."""
        return [
            name
            for name, cosine in next(iter(self.cosines.values()), {}).items()
            if not math.isnan(cosine)
        ]

    def lowest(self, label: str) -> tuple[str, float]:
        """The layer in which a rule's gradient is farthest from BPTT's, and its cosine."""
        known = {
            name: cosine for name, cosine in self.cosines[label].items() if not math.isnan(cosine)
        }
        return min(known.items(), key=lambda item: item[1]) if known else ("", math.nan)


def fidelity(
    bptt: Gradients, sltt: Gradients | None, others: Mapping[str, Sequence[Gradients]]
) -> Fidelity:
    """Compare gradients of one network on one batch.

    `sltt`: None where SLTT cannot train it, so that its share is not known; `others`: by label,
    what each gave in its draws."""
    shares = {} if sltt is None else {name: _share(g, sltt[name]) for name, g in bptt.items()}
    cosines = {
        label: {
            name: statistics.fmean(_cosine(g, draw[name]) for draw in draws)
            for name, g in bptt.items()
        }
        for label, draws in others.items()
    }
    return Fidelity(shares, cosines)


def _share(bptt: Tensor, sltt: Tensor) -> float:
    size = float(bptt.norm())
    return float((bptt - sltt).norm()) / size if size else math.nan


def _cosine(bptt: Tensor, other: Tensor) -> float:
    sizes = float(bptt.norm()), float(other.norm())
    if not sizes[0] or not math.isfinite(sizes[0]):
        return math.nan
    if not math.isfinite(sizes[1]):
        return -1.0
    return float((bptt * other).sum()) / (sizes[0] * sizes[1]) if sizes[1] else 0.0
