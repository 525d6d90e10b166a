"""Batches that cross to a card one ahead, on a stream of their own, and are looked up there."""

from collections.abc import Iterator

import pytest
import torch

from pipeline.data.base import Batch
from pipeline.train.transfer import arriving, move_batch, move_network
from tests.helpers.cards import device_of
from tests.helpers.families import small_qkformer

pytestmark = pytest.mark.gpu

BATCHES, SHAPE = 40, (16, 3, 96, 96)


def batches(taken: list[int], *, pinned: bool) -> Iterator[Batch]:
    draw, table = torch.Generator().manual_seed(0), torch.randn(3, 256)
    for number in range(BATCHES):
        taken.append(number)
        x_B = torch.randint(256, SHAPE, generator=draw, dtype=torch.uint8)
        index_B = torch.full((SHAPE[0],), number)
        yield Batch(x_B.pin_memory() if pinned else x_B, index_B.clone(), index_B, table)


@pytest.mark.parametrize("pinned", [True, False])
def test_what_arrives_is_what_was_sent_while_the_card_is_busy(pinned: bool) -> None:
    """The memory of a batch is freed before its kernels have run, so another copy could take it."""
    device, taken, sums = device_of("cuda"), list[int](), []
    busy = torch.rand(4096, 4096, device=device)
    for number, batch in enumerate(arriving(batches(taken, pinned=pinned), device)):
        assert len(taken) == min(number + 2, BATCHES)
        x_B = batch.arrive().x
        assert x_B.is_contiguous(memory_format=torch.channels_last)
        for _ in range(4):
            busy = (busy @ busy).sigmoid()
        sums.append((x_B.double() * torch.arange(1, 97, device=device)).sum())
    sent = [move_batch(batch, torch.device("cpu")).x for batch in batches([], pinned=False)]
    expected = [float((x_B.double() * torch.arange(1, 97)).sum()) for x_B in sent]
    assert torch.stack(sums).tolist() == pytest.approx(expected, rel=1e-12)


def test_the_bits_are_those_of_a_cpu() -> None:
    device = device_of("cuda")
    for batch in batches([], pinned=False):
        sent, arrived = (move_batch(batch, on) for on in (torch.device("cpu"), device))
        assert torch.equal(arrived.x.cpu(), sent.x) and torch.equal(arrived.index, sent.index)


def test_the_weights_of_convolutions_are_channels_last() -> None:
    network = move_network(small_qkformer(), device_of("cuda"))
    weights = [p for p in network.parameters() if p.dim() == 4]
    assert weights
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
