"""Heads: the selected one answers and learns; the weights on disk do not tell which it was."""

# T time, B batch, K classes

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.models.mlp import mlp
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.models.transforms import MultiHead, multi_head, select_head
from pipeline.models.vgg import vgg_sws
from tests.helpers.rule_networks import outputs


def small() -> Any:
    torch.manual_seed(0)
    return multi_head(mlp(3, in_features=4, hidden=(5,)), heads=3)


def answer(network: nn.Module, x_TB: torch.Tensor) -> torch.Tensor:
    return outputs(network, x_TB, grad=True)


def test_the_selected_head_answers() -> None:
    network, x_TB = small(), torch.randn(2, 6, 4)
    heads = network.classifier.heads
    assert len(heads) == 3
    for index, head in enumerate(heads):
        nn.init.constant_(head.weight, index + 1.0)
        nn.init.zeros_(head.bias)
    first = answer(network, x_TB)
    for index in (2, 0, 1):
        select_head(network, index)
        torch.testing.assert_close(answer(network, x_TB), (index + 1) * first)


def test_heads_begin_alike_with_weights_of_their_own() -> None:
    network = small()
    one, two, _ = network.classifier.heads
    assert torch.equal(one.weight, two.weight)
    assert one.weight.data_ptr() != two.weight.data_ptr()


def test_the_state_dict_does_not_know_the_selection() -> None:
    one, other = small(), small()
    select_head(other, 2)
    assert one.state_dict().keys() == other.state_dict().keys()
    one.load_state_dict(other.state_dict())
    assert one.classifier.selected == 0
    assert [key for key in one.state_dict() if "classifier" in key] == [
        f"classifier.heads.{index}.{part}" for index in range(3) for part in ("weight", "bias")
    ]


def test_other_heads_get_no_gradient() -> None:
    network = small()
    select_head(network, 1)
    answer(network, torch.randn(2, 6, 4)).square().sum().backward()
    assert [head.weight.grad is not None for head in network.classifier.heads] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(
    "network",
    [nf_resnet18_small(2, in_channels=1, width=4, blocks=(1,)), vgg_sws(2, stages=((4,), (4,)))],
)
def test_every_network_with_a_classifier_may_have_heads(network: nn.Module) -> None:
    channels = next(network.parameters()).shape[1]
    several = multi_head(network, heads=2)
    select_head(nn.Sequential(several), 1)
    assert answer(several, torch.randn(2, 3, channels, 8, 8)).shape == (2, 3, 2)


def test_refuses() -> None:
    for said, refused in (
        (r"module `classifier`; got heads=2, Linear", lambda: multi_head(nn.Linear(2, 2), heads=2)),
        ("got heads=0, MLP", lambda: multi_head(mlp(3, in_features=4, hidden=(5,)), heads=0)),
        ("at least one head; got none", lambda: MultiHead([])),
        (r"head must be in 0\.\.2; got 3", lambda: select_head(small(), 3)),
        (
            "must have several heads, see multi_head; got MLP",
            lambda: select_head(mlp(3, in_features=4), 0),
        ),
    ):
        with pytest.raises(ValueError, match=said):
            refused()
