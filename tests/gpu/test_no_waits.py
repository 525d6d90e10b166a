"""Nothing in a batch waits for the card: each wait leaves it idle until the host has caught up."""

# T time, B batch

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.rules.base import Rule, World
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.train.objective import CrossEntropy
from tests.helpers.cards import CUDA, device_of
from tests.helpers.rule_cases import CASES, Case
from tests.helpers.rule_networks import batch, cross_entropy, learn

RULES = {
    "BPTT": lambda: BPTT(),
    "BPTT-recompute": lambda: BPTT(recompute=True),
    "SLTT": lambda: SLTT(),
    "SLTT-1": lambda: SLTT(k=1),
    "SLTT-2": lambda: SLTT(k=2, rescale=True),
    "OTTT": lambda: OTTT(),
}
# IDE and SPIDE ask whether they have converged.
CASES_WITHOUT_WAITS = [case for case in CASES if not case.name.startswith(("ide", "spide"))]


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
    with _no_waits(on):
        _learn(made, network, on)
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("case", CASES_WITHOUT_WAITS, ids=[c.name for c in CASES_WITHOUT_WAITS])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_no_rule_waits(device: str, case: Case) -> None:
    """Among them are OPZO, DSR, and HLOP around others. On a CPU nothing waits: the test runs."""
    on, rule = device_of(device), case.rule()
    network = case.model().to(on, torch.float32)
    rule.attach(network, world=World(seed=7), over_time=rule.over_time_choices[0])
    x_TB, target_B = batch(4)
    x_TB, target_B = x_TB.to(on, torch.float32), target_B.to(on)
    for waits in (nullcontext(), _no_waits(on)):
        with waits:
            learn(rule.loss_terms(network, x_TB, cross_entropy(target_B), step=0))
            rule.end_of_batch()
    assert any(parameter.grad is not None for parameter in network.parameters())


@contextmanager
def _no_waits(on: torch.device) -> Iterator[None]:
    """An error at whatever makes the host wait for the GPU."""
    if on.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if on.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def _learn(rule: Rule, network: nn.Module, on: torch.device) -> None:
    network.zero_grad()
    x_TB = torch.zeros(4, 8, 1, 8, 8, device=on)
    target_B = torch.zeros(8, dtype=torch.long, device=on)
    learn(rule.loss_terms(network, x_TB, CrossEntropy()(target_B), step=0))
    rule.end_of_batch()
