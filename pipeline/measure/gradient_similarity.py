"""The similarity of a rule's gradient to that of BPTT, layer by layer, on one batch.

With g the gradient of a synapse's weight:

    cosine(rule)     g_rule . g_BPTT / (|g_rule| |g_BPTT|)      the mean over the rule's draws; 0 if
                                                                g_rule is 0, -1 if it is not finite
    temporal share   |g_BPTT - g_SLTT| / |g_BPTT|               the part that passes through time

Both describe the current weights: they show what a rule omits there, not how well it learns.
"""

# T time, B batch

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from pipeline.rules.base import LossFn, OverTime, Rule, World
from pipeline.spiking.dropout import Dropout
from pipeline.spiking.synapse import Conv2d, Linear

Gradients = Mapping[str, Tensor]  # by the name of a synapse


def gradients(
    network: nn.Module,
    rule: Rule,
    x_TB: Tensor,
    loss_for: Callable[[], LossFn],
    *,
    world: World = World(),
    over_time: OverTime = "steps",
    learnt: Mapping[str, Tensor] | None = None,
    step: int = 0,
    batches: int = 1,
) -> dict[str, Tensor]:
    """The gradient that `rule` gives each synapse's weight in a copy of `network`.

    The synapses are in order of registration.

    Dropout is off: BPTT draws it layer by layer and an online rule step by step, so no seed makes
    the two equal. All other random draws use equally seeded generators.

    Args:
        loss_for: makes a new loss for each batch.
        world: its seed and `step` determine the rule's random draws.
        learnt: the state dict of a rule that trains its own parameters, such as OPZO; None: a fresh
            state.
        batches: the number of times that the rule sees the batch; the last gradient is returned.

    Raises:
        ValueError: the rule refuses the network.
    """
    network = copy.deepcopy(network)
    rule.attach(network, world=world, over_time=over_time)
    if learnt is not None:
        rule.load_state_dict(learnt)
    for module in network.modules():
        if isinstance(module, (_DropoutNd, Dropout)):
            module.eval()
    try:
        for index in range(step, step + batches):
            network.zero_grad()
            with torch.random.fork_rng([x_TB.device] if x_TB.is_cuda else []):
                torch.manual_seed(world.seed)
                for term in rule.loss_terms(network, x_TB, loss_for(), step=index):
                    if term.backward is not None:
                        term.backward.backward()
            rule.end_of_batch()
    finally:
        rule.release()
    return {
        name: torch.zeros_like(w) if (w := module.weight).grad is None else w.grad
        for name, module in network.named_modules()
        if isinstance(module, (Linear, Conv2d))
    }


@dataclass(frozen=True)
class Fidelity:
    """Measures of each synapse, by name. NaN if BPTT's gradient is 0 or not finite."""

    temporal_share: dict[str, float]
    cosines: dict[str, dict[str, float]]  # by rule label

    @property
    def layers(self) -> list[str]:
        """The synapses; empty if no rule was compared."""
        return list(next(iter(self.cosines.values()), {}))

    @property
    def comparable(self) -> list[str]:
        """Synapses whose BPTT gradient is finite and not 0. They are the same for every rule."""
        cosines = next(iter(self.cosines.values()), {})
        return [name for name, cosine in cosines.items() if not math.isnan(cosine)]

    def lowest(self, label: str) -> tuple[str, float]:
        """The layer with a rule's lowest cosine, and the cosine."""
        known = {
            name: cosine for name, cosine in self.cosines[label].items() if not math.isnan(cosine)
        }
        return min(known.items(), key=lambda item: item[1]) if known else ("", math.nan)


def fidelity(
    bptt: Gradients, sltt: Gradients | None, others: Mapping[str, Sequence[Gradients]]
) -> Fidelity:
    """Compare gradients of one network on one batch.

    Args:
        sltt: None if SLTT cannot train the network; the temporal share is then unknown.
        others: the gradients of each rule's draws, by rule label.
    """
    return Fidelity(
        {} if sltt is None else {name: _share(g, sltt[name]) for name, g in bptt.items()},
        {
            label: {
                name: statistics.fmean(_cosine(g, draw[name]) for draw in draws)
                for name, g in bptt.items()
            }
            for label, draws in others.items()
        },
    )


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
