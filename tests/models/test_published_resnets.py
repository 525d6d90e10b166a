"""Residual networks with published weights: key lists of the published modules, there and back."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.models import ms_resnet, nf_resnet, preact_resnet, sew_resnet
from pipeline.models.published import to_published
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import batch_norms
from pipeline.train.weights import load_start
from tests.helpers.rule_networks import outputs, refusals

GOLDEN = Path(__file__).parents[1] / "golden"
# By file of names and shapes, of published modules with 2, 1, 1 and 1 blocks in their stages.
READERS: dict[str, Callable[..., Any]] = {
    "nf_resnet": nf_resnet.from_published,
    "nf_resnet_ottt": nf_resnet.from_published,
    "ms_resnet": ms_resnet.from_published,
    "ms_resnet_deep": ms_resnet.from_published,
    "sew_resnet": sew_resnet.from_published,
    "sew_resnet_sequential": sew_resnet.from_published,
    "spiking_resnet": sew_resnet.from_published,
    "preact_resnet": preact_resnet.from_published,
}
# What only some published modules have in their names.
SPELLINGS = {
    "nf_resnet_ottt": (r"\.op\.", "."),
    "sew_resnet_sequential": (r"(\.conv\d|downsample\.0)\.(\d)\.", r"\1.module.\2."),
}


def published(name: str) -> dict[str, Tensor]:
    """Random tensors with the names and shapes of a published module."""
    generator = torch.Generator().manual_seed(0)
    lines = [line.split() for line in (GOLDEN / f"{name}.txt").read_text().splitlines()]
    return {
        key: torch.rand(tuple(map(int, shape)), generator=generator) + 0.1 for key, *shape in lines
    }


@pytest.mark.parametrize("name", READERS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    theirs = published(name)
    counter = {"bn1.num_batches_tracked": torch.tensor(3)}
    network = READERS[name](theirs | counter)
    assert all(norm.over == "time" for norm in batch_norms(network))
    spelling = SPELLINGS.get(name, ("$^", ""))
    back = to_published(network)
    assert back.keys() == {re.sub(*spelling, key) for key in theirs}
    for key, tensor in theirs.items():
        assert torch.equal(back[re.sub(*spelling, key)], tensor), key

    torch.save({"net": theirs}, tmp_path / "published.pth")
    another = READERS[name](published(name))
    for parameter in another.parameters():
        nn.init.zeros_(parameter)
    assert load_start(another, tmp_path / "published.pth") == ()
    assert all(map(torch.equal, another.state_dict().values(), network.state_dict().values()))


def test_arguments() -> None:
    network: Any = nf_resnet.from_published(published("nf_resnet_ottt"), neuron=LIF(0.25))
    assert network.stages[0][0].first.neuron.decay == 0.25
    assert [len(stage) for stage in network.stages] == [2, 1, 1, 1]
    network = ms_resnet.from_published(published("ms_resnet_deep"), over="step")
    assert {norm.over for norm in batch_norms(network)} == {"step"}
    assert network.dropout.share == 0.2
    assert outputs(network.eval(), torch.rand(1, 1, 3, 64, 64)).shape == (1, 1, 10)


test_refuses = refusals(
    [
        (
            lambda: nf_resnet.from_published(published("ms_resnet")),
            r"from_published: the tensor 'conv1\.weight' must have 4 dimensions; got none",
        ),
        (
            lambda: sew_resnet.from_published(
                published("sew_resnet") | {"fc.scale": torch.ones(1)}
            ),
            r"must be those of a published SEWResNet; got 1 unknown: fc\.scale",
        ),
        (
            lambda: to_published(nf_resnet.nf_resnet18_small(width=4)),
            "to_published: the network must have the form of a published one; got NFResNet",
        ),
        (
            lambda: to_published(ms_resnet.MSResNet(blocks=(1,), classes=2, shortcut="multiple")),
            "to_published: the network must have the form of a published one; got MSResNet",
        ),
    ]
)
