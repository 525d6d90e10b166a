"""Batches on their way to the network, one ahead; channels last in memory, from images to
classifier.

The functions that need no CUDA stream run here on the CPU; tests/gpu has the whole path on a card.
"""

import threading
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.data.base import Batch
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.data.mixing import Mixing
from pipeline.models.nf_resnet import NFResNet
from pipeline.models.qkformer import QKFormer
from pipeline.recipe.recipe import Evaluation, Policy
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.encode import to_time_first
from pipeline.spiking.neuron import LIF
from pipeline.spiking.state import fresh_state
from pipeline.spiking.synapse import Conv2d
from pipeline.train import evaluation, trainer, transfer
from pipeline.train.backend.collectives import fingerprint
from pipeline.train.checkpoint import weights_of
from pipeline.train.objective import CrossEntropy
from pipeline.train.transfer import (
    Arriving,
    arriving,
    channels_last,
    look_up,
    one_ahead,
    use_channels_last,
)
from tests.helpers.families import RESNETS, STREAMS, small_qkformer
from tests.helpers.loaders import read
from tests.helpers.rule_networks import gradients
from tests.helpers.small import finished, goes_on, same_weights, small_recipe

CPU, LAST = torch.device("cpu"), torch.channels_last
TRAIN: dict[str, Any] = {"seed": 5, "rank": 0, "world": 1, "batch_size": 12, "micro_batch": 12}


# ------------------------------------------------------------------------------------- one ahead


def numbers(taken: list[int], count: int = 4) -> Iterator[int]:
    for number in range(count):
        taken.append(number)
        yield number


def test_one_item_is_taken_ahead_and_the_order_stays() -> None:
    taken: list[int] = []
    ahead = one_ahead(numbers(taken))
    assert taken == []
    assert [(next(ahead), len(taken)) for _ in range(4)] == [(0, 2), (1, 3), (2, 4), (3, 4)]
    with pytest.raises(StopIteration):
        next(ahead)
    assert [list(one_ahead(iter(items))) for items in ([], [7])] == [[], [7]]


def test_nothing_is_taken_after_an_early_end() -> None:
    taken: list[int] = []
    assert list(islice(one_ahead(numbers(taken)), 2)) == [0, 1]
    assert taken == [0, 1, 2]


def test_a_cpu_takes_nothing_ahead_and_copies_nothing() -> None:
    threads, batches = threading.active_count(), read(Synthetic(24).train(**TRAIN, threads=1))
    taken: list[Batch] = []
    source = arriving((taken.append(batch) or batch for batch in batches), CPU)
    assert next(source).arrive() is batches[0] and len(taken) == 1
    assert [each.arrive() for each in source] == batches[1:]
    assert threading.active_count() == threads


def test_the_card_waits_for_a_copy_and_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the calls to CUDA; tests/gpu has their effect."""
    calls: list[str] = []
    side, compute = MagicMock(name="side", device=CPU), MagicMock(name="compute")
    event = MagicMock()
    event.record.side_effect = lambda stream: calls.append(f"record on {stream._mock_name}")
    compute.wait_event.side_effect = lambda waited: calls.append(f"wait {waited is event}")
    within = MagicMock()
    within.__enter__.side_effect = lambda: calls.append("enter")
    within.__exit__.side_effect = lambda *_: calls.append("exit")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: within if stream is side else None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    keep = lambda tensor, stream: calls.append(f"{tensor.dtype} for {stream._mock_name}")
    monkeypatch.setattr(Tensor, "record_stream", keep)
    move = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda *a, **how: calls.append("copy") or move(*a, **how))
    monkeypatch.setattr(transfer, "look_up", lambda *_: calls.append("look up") or torch.zeros(1))

    level_B, target_B = torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(2).long()
    batch = Batch(level_B, target_B, target_B, torch.zeros(1, 256))
    source = arriving(iter([batch]), torch.device("cuda"))
    arrived = next(source).arrive()
    assert calls == [
        *("enter", "copy", "copy", "copy", "record on side", "exit", "wait True"),
        *(f"torch.{name} for compute" for name in ("uint8", "int64", "float32")),
        "look up",
    ]
    assert arrived.table is None and arrived.index is target_B


def test_a_run_that_takes_one_ahead_trains_on_the_same_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a batch is skipped, an epoch is resumed in its middle, and a set is evaluated in
    part. As on a card, without its stream.
    """
    recipe = small_recipe(
        micro_batch=4, policy=Policy(skip=((3, 4),)), evaluation=Evaluation(samples=10)
    )
    plain = finished(tmp_path / "plain", recipe)
    ahead = lambda batches, device: one_ahead(map(Arriving, batches))
    for module in (trainer, evaluation):
        monkeypatch.setattr(module, "arriving", ahead)
    whole, _ = goes_on(tmp_path, recipe)
    assert same_weights(tmp_path / "plain", tmp_path / "whole")
    assert whole["top1"] == plain["top1"]


# ---------------------------------------------------------------------------------- channels last


class Convolutions(TorchDispatchMode):
    """Counts the convolutions, forward and backward, by whether the tensors of each with more than
    one channel and one pixel are channels last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward, self.backward = [0, 0], [0, 0]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        counts = {
            torch.ops.aten.convolution: (self.forward, 2),
            torch.ops.aten.convolution_backward: (self.backward, 3),
        }.get(func.overloadpacket)
        if counts is not None:
            counted, operands = counts
            counted[all(map(is_channels_last, args[:operands]))] += 1
        return func(*args, **(kwargs or {}))


def is_channels_last(x_NCHW: Tensor) -> bool:
    return x_NCHW.is_contiguous(memory_format=LAST)


def nf_resnet34() -> NFResNet:
    """Of width 4."""
    neuron = LIF(1 / 11)
    return NFResNet(
        blocks=(3, 4, 6, 3), classes=5, in_channels=3, width=4, stem="imagenet", neuron=neuron
    )


def qkformer_10() -> QKFormer:
    return QKFormer(channels=16, depth=10, heads=2, classes=5)


NETWORKS = {"nf_resnet34": (nf_resnet34, 36), "qkformer_10": (qkformer_10, 67)}


def learnt(network: nn.Module, rule: BPTT | SLTT, x_TB: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.no_grad(), fresh_state(network):
        logits_TBK = network(x_TB)
    loss_fn = CrossEntropy()(torch.arange(x_TB.shape[1]) % 5)
    return logits_TBK, gradients(rule, network, x_TB, loss_fn)


@pytest.mark.parametrize("rule", [BPTT, SLTT])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolution_is_channels_last_and_computes_the_same(name: str, rule: Any) -> None:
    build, layers = NETWORKS[name]
    torch.manual_seed(0)
    network = build().double()
    for parameter in network.parameters():  # no classifier or branch that starts at 0
        if not parameter.any():
            nn.init.uniform_(parameter, -0.5, 0.5)
    x_B = torch.rand(2, 3, 64, 64, dtype=torch.float64) * 2
    plain = learnt(network, rule(), to_time_first(x_B, 2))
    use_channels_last(network)
    x_TB = to_time_first(channels_last(x_B), 2)
    ours = learnt(network, rule(), x_TB)
    assert (ours[0] - plain[0]).abs().max() < 1e-9 < plain[0].abs().max()
    assert ours[1].keys() == plain[1].keys()
    for key, grad in plain[1].items():
        assert (ours[1][key] - grad).abs().max() <= 1e-9 * (1 + grad.abs().max()), key
    with Convolutions() as counted:
        learnt(network, rule(), x_TB)
    calls = 1 if rule is BPTT else 2  # of a layer behind the stem
    assert counted.forward[0] == 0 and counted.forward[1] >= (1 + calls) * (layers - 1)
    # The stem's gradient is a sum over repeated frames, which torch makes contiguous.
    assert counted.backward[0] <= 1 and counted.backward[1] >= calls * (layers - 1)


STREAMS_BY_NAME = {
    f"qkformer, {shortcut}, {norm}": partial(small_qkformer, shortcut, norm)
    for shortcut, norm in STREAMS
}


@pytest.mark.parametrize("name", [*RESNETS, *STREAMS_BY_NAME])
def test_no_kind_of_block_breaks_the_order(name: str) -> None:
    network = (RESNETS | STREAMS_BY_NAME)[name]()
    use_channels_last(network)
    x_TB = to_time_first(channels_last(torch.rand(2, 3, 32, 32)), 2)
    with Convolutions() as counted, torch.no_grad(), fresh_state(network):
        network(x_TB)
    layers = sum(isinstance(module, Conv2d) for module in network.modules())
    assert counted.forward == [0, layers]


def test_images_of_one_channel_are_channels_last_for_torch_too() -> None:
    """With one channel both orders have the same bytes; torch goes by the strides."""
    plain, conv, x_B = nn.Conv2d(1, 3, 3), nn.Conv2d(1, 3, 3), torch.rand(2, 1, 6, 5)
    use_channels_last(conv)
    assert plain(x_B).is_contiguous() and is_channels_last(conv(x_B))
    table, level_B = torch.rand(1, 256), torch.zeros(2, 1, 6, 5, dtype=torch.uint8)
    images = channels_last(x_B), look_up(level_B, table), channels_last(x_B[:, None])[:, 0]
    assert all(is_channels_last(plain(each)) for each in images)


def test_steps_of_recordings_have_their_channels_last() -> None:
    x_B = torch.rand(3, 4, 2, 5, 6)
    plain, ours = to_time_first(x_B, 4), to_time_first(channels_last(x_B), 4)
    assert torch.equal(plain, ours) and plain.is_contiguous()
    assert all(map(is_channels_last, ours)) and is_channels_last(ours.flatten(0, 1))
    assert ours.flatten(0, 1).data_ptr() == ours.data_ptr()


@pytest.mark.parametrize("shape", [(4, 3, 6, 5), (4, 2, 3, 6, 5)])
def test_mixing_keeps_the_order_of_memory(shape: tuple[int, ...]) -> None:
    mix = Mixing(mixup=1.0, cutmix=1.0, per="pair")
    how: Any = {"classes": 3, "seed": 0, "step": 0, "rows": range(4)}
    x_B, target_B = torch.rand(shape), torch.tensor([0, 1, 2, 0])
    mixed_B = mix(channels_last(x_B), target_B, **how)[0]
    assert torch.equal(mixed_B, mix(x_B, target_B, **how)[0])
    assert mixed_B.stride() == channels_last(x_B).stride()


def test_checkpoints_and_hashes_do_not_see_the_order_of_memory() -> None:
    torch.manual_seed(0)
    network = nf_resnet34()
    plain, digest = weights_of(network), fingerprint(network.state_dict().values())
    use_channels_last(network)
    assert not network.get_parameter("stem.0.weight").is_contiguous()
    assert fingerprint(network.state_dict().values()) == digest
    ours = weights_of(network)
    assert ours.keys() == plain.keys()
    assert all(each.is_contiguous() and torch.equal(each, plain[key]) for key, each in ours.items())
    other = nf_resnet34()
    use_channels_last(other)
    other.load_state_dict(plain)
    weight = other.get_parameter("stem.0.weight")
    assert is_channels_last(weight) and not weight.is_contiguous()
    assert fingerprint(other.state_dict().values()) == digest
