"""The similarity of a rule's gradient to BPTT's, layer by layer, on one batch.

With g the gradient of a layer's weight:

    cosine(rule)     g_rule . g_BPTT / (|g_rule| |g_BPTT|)      the mean over the rule's draws; 0 if
                                                                g_rule is 0, -1 if it is not finite
    temporal share   |g_BPTT - g_SLTT| / |g_BPTT|               the part that passes through time

Both hold for the current weights only. They show which part of the gradient a rule omits, not how
well the rule learns.
"""

# T time, B batch

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from pipeline.core.torch_settings import seed_torch
from pipeline.rules.base import LossFn, OverTime, Rule, World
from pipeline.spiking.dropout import Dropout

Gradients = Mapping[str, Tensor]  # by the name of a layer


def gradients(
    network: nn.Module,
    rule: Rule,
    x_TB: Tensor,
    make_loss: Callable[[], LossFn],
    *,
    world: World = World(),
    over_time: OverTime = "steps",
    rule_state: Mapping[str, Tensor] | None = None,
    step: int = 0,
    batches: int = 1,
) -> dict[str, Tensor]:
    """The gradient that `rule` computes for each layer's weight in a copy of `network`.

    The layers are linear layers and convolutions, torch's included, in order of registration. A
    layer with a frozen weight is left out.

    Dropout is off, because torch's dropout draws in the order of calls, which is layer by layer in
    BPTT and step by step in an online rule. All other random draws use equally seeded generators.

    Args:
        make_loss: makes the loss function; called for each batch.
        world: its seed and `step` determine the rule's random draws.
        rule_state: the state dict of a rule that trains its own parameters, such as OPZO; None: a
            fresh state.
        batches: the number of times that the rule sees the batch; the last gradient is returned.

    Raises:
        ValueError: the rule refuses the network.
    """
    network = copy.deepcopy(network)
    # before `attach`, which may replace a layer by another one with the same weight
    weights = {
        name: module.weight
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, _ConvNd)) and module.weight.requires_grad
    }
    rule.attach(network, world=world, over_time=over_time)
    if rule_state is not None:
        rule.load_state_dict(rule_state)
    for module in network.modules():
        if isinstance(module, (_DropoutNd, Dropout)):
            module.eval()
    try:
        for index in range(step, step + batches):
            network.zero_grad()
            with torch.random.fork_rng([x_TB.device] if x_TB.is_cuda else []):
                seed_torch(world.seed)
                for term in rule.loss_terms(network, x_TB, make_loss(), step=index):
                    if term.backward is not None:
                        term.backward.backward()
            rule.end_of_batch()
    finally:
        rule.release()
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in weights.items()
    }


@dataclass(frozen=True)
class Fidelity:
    """Both measures of each layer, by its name. NaN if BPTT's gradient is 0 or not finite."""

    temporal_share: dict[str, float]
    cosines: dict[str, dict[str, float]]  # by rule label

    @property
    def layers(self) -> list[str]:
        """Names of the layers; empty if no rule was compared."""
        return list(next(iter(self.cosines.values()), {}))

    @property
    def comparable(self) -> list[str]:
        """Names of the layers with a cosine, which are the same for every rule."""
        cosines = next(iter(self.cosines.values()), {})
        return [name for name, cosine in cosines.items() if not math.isnan(cosine)]

    def lowest(self, label: str) -> tuple[str, float]:
        """The layer with a rule's lowest cosine, and the cosine; ("", NaN) without any cosine."""
        cosines = {
            name: cosine
            for name, cosine in self.cosines.get(label, {}).items()
            if not math.isnan(cosine)
        }
        return min(cosines.items(), key=lambda item: item[1]) if cosines else ("", math.nan)


def fidelity(
    bptt: Gradients, sltt: Gradients | None, rules: Mapping[str, Sequence[Gradients]]
) -> Fidelity:
    """Compare gradients of one network on one batch.

    Args:
        bptt: BPTT's gradients.
        sltt: SLTT's gradients. None if SLTT cannot train the network; the temporal shares are then
            empty.
        rules: the gradients of each rule, one mapping per draw, by rule label.
    """
    return Fidelity(
        {} if sltt is None else {name: _temporal_share(g, sltt[name]) for name, g in bptt.items()},
        {
            label: {
                name: statistics.fmean(_cosine(g, draw[name]) for draw in draws)
                for name, g in bptt.items()
            }
            for label, draws in rules.items()
        },
    )


def _temporal_share(bptt: Tensor, sltt: Tensor) -> float:
    norm = float(bptt.norm())
    return float((bptt - sltt).norm()) / norm if norm else math.nan


def _cosine(bptt: Tensor, other: Tensor) -> float:
    bptt_norm, other_norm = float(bptt.norm()), float(other.norm())
    if not bptt_norm or not math.isfinite(bptt_norm):
        return math.nan
    if not math.isfinite(other_norm):
        return -1.0
    return float((bptt * other).sum()) / (bptt_norm * other_norm) if other_norm else 0.0
