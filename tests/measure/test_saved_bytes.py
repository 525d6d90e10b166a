"""Bytes between two batches, counted by hand."""

from typing import Any

import torch
from torch import nn

from pipeline.measure.saved_bytes import HeldBytes, held_bytes, storage_bytes


def network_after_a_step(optimizer_of: Any, **settings: float) -> HeldBytes:
    network = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
    )  # 16 + 8 + 10 parameters
    network[2].bias.requires_grad_(False)
    optimizer = optimizer_of(network.parameters(), lr=0.1, **settings)
    network(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return held_bytes(network, optimizer)


def test_sgd_with_momentum_keeps_one_number_for_each_that_learns() -> None:
    found = network_after_a_step(torch.optim.SGD, momentum=0.9)
    assert found == HeldBytes(
        parameters=34 * 4, buffers=2 * 4 * 4 + 8, gradients=32 * 4, optimizer=32 * 4
    )


def test_adam_keeps_two_and_a_count() -> None:
    assert (
        network_after_a_step(torch.optim.Adam).optimizer == 2 * 32 * 4 + 5 * 4
    )  # five tensors that learn, a count for each


def test_plain_sgd_keeps_nothing_and_views_count_once() -> None:
    assert network_after_a_step(torch.optim.SGD).optimizer == 0
    whole = torch.zeros(10)
    assert storage_bytes([whole, whole[:3], whole.view(2, 5)]) == 40
