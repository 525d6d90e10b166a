"""Gradients in bf16 beside those in fp32, of rules with seams, on a network whose every current and
membrane bf16 holds exactly.

So no spike flips, whatever is rounded, and what is left to differ is the arithmetic of the
backward.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pipeline.rules.base import Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.hlop import HLOP
from pipeline.rules.opzo import OPZO
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF
from pipeline.spiking.synapse import Linear
from pipeline.train.backend.plain import Plain
from pipeline.train.objective import CrossEntropy
from tests.helpers.rule_networks import spikes_of

ROWS = ((3, 4, 3), (1, 2, 2))
RULES: dict[str, Callable[[], Rule]] = {
    "BPTT": BPTT,
    "OTTT": OTTT,
    "DFA": lambda: OPZO("random"),
    "HLOP": lambda: HLOP(SLTT(), rows=ROWS),
    "HLOP, sign-symmetric": lambda: HLOP(SLTT(), rows=ROWS, error="sign_symmetric"),
    "HLOP, feedback": lambda: HLOP(SLTT(), rows=ROWS, error="feedback"),
}


def gradients(rule: Rule, precision: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Of every parameter, as a backend gets them, and the spikes. Weights are quarters, inputs
    halves: currents are eighths.
    """
    draw = torch.Generator().manual_seed(0)
    network = nn.Sequential(Linear(6, 8), LIF(), Linear(8, 7), LIF(), Linear(7, 3))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape, generator=draw) / 4)
    x_TBC, target_B = (
        torch.randint(-2, 3, (4, 32, 6), generator=draw) / 2,
        torch.randint(3, (32,), generator=draw),
    )
    backend = Plain(
        network, lambda network: torch.optim.SGD(network.parameters(), lr=0.1), precision=precision
    )
    rule.attach(network)
    record = spikes_of(network)
    for objective in rule.loss_terms(backend.model, x_TBC, CrossEntropy()(target_B)):
        assert objective.backward is not None
        backend.backward(objective.backward, 1.0)
    spikes = [torch.cat(slices).float() for slices in record.values()]
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}, spikes


@pytest.mark.parametrize("name", RULES)
def test_a_gradient_in_bf16_is_within_two_per_cent(name: str) -> None:
    full, spikes = gradients(RULES[name](), "fp32")
    half, same = gradients(RULES[name](), "bf16")
    assert all(
        torch.equal(one, other) and 0.1 < one.mean() < 0.6
        for one, other in zip(spikes, same, strict=True)
    )
    assert len(full) == 6 and full.keys() == half.keys()
    apart = {key: float((half[key] - g).norm() / g.norm()) for key, g in full.items()}
    assert max(apart.values()) < 0.02 and min(apart[f"{layer}.weight"] for layer in (0, 2, 4)) > 0
