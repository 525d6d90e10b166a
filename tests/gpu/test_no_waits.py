"""Nothing in a batch waits for the card: each wait leaves it idle until the host has caught up."""

# T time, B batch

import pytest
import torch
from torch import nn

from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.rules.base import Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.train.objective import CrossEntropy
from tests.helpers.cards import CUDA, device_of
from tests.helpers.rule_networks import learn

RULES = {
    "BPTT": lambda: BPTT(),
    "BPTT-recompute": lambda: BPTT(recompute=True),
    "SLTT": lambda: SLTT(),
    "SLTT-2": lambda: SLTT(k=2, rescale=True),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("device", ["meta", CUDA])
def test_a_batch_asks_for_no_value(device: str, rule: str) -> None:
    """A tensor on `meta` has no value: whatever asks for one fails there, and so does a tensor that
    was left on the CPU.
    """
    made, on = RULES[rule](), device_of(device)
    network = nf_resnet18_small(classes=10, in_channels=1, width=4, blocks=(1, 1)).to(on)
    made.attach(network)
    _learn(made, network, on)  # what is loaded or compiled at first use may wait
    if on.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        _learn(made, network, on)
    finally:
        if on.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert all(parameter.grad is not None for parameter in network.parameters())


def _learn(rule: Rule, network: nn.Module, on: torch.device) -> None:
    network.zero_grad()
    x_TB = torch.zeros(4, 8, 1, 8, 8, device=on)
    target_B = torch.zeros(8, dtype=torch.long, device=on)
    learn(rule.loss_terms(network, x_TB, CrossEntropy()(target_B), step=0))
    rule.end_of_batch()
