"""Parts of a network by name, and what cannot be 1-bit."""

# T time, B batch, C channels, K classes

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.convnet import convnet
from pipeline.models.feedback import fc_feedback
from pipeline.models.mlp import mlp
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.models.preact_resnet import preact_resnet18_small
from pipeline.models.qkformer import qkformer_10
from pipeline.models.transforms import binarized, late, multi_head
from pipeline.recipe.recipe import Recipe, spec
from pipeline.rules.bptt import BPTT
from pipeline.rules.hlop import HLOP
from pipeline.rules.sltt import SLTT
from pipeline.spiking.binary import binary_synapses
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.state import fresh_state
from pipeline.spiking.synapse import Linear
from tests.helpers.small import small_recipe


class FeedForward(nn.Module):
    part = "ffn"

    def __init__(self, channels: int, *, plain: bool = True) -> None:
        super().__init__()
        self.up, self.norm1, self.neuron1 = (
            Linear(channels, 4 * channels),
            BatchNorm(4 * channels),
            LIF(),
        )
        self.down = Linear(4 * channels, channels) if plain else nn.Linear(4 * channels, channels)
        self.norm2, self.neuron2 = BatchNorm(channels), LIF()

    def forward(self, h_TBC: Tensor) -> Tensor:
        return h_TBC + self.norm2(self.down(self.neuron2(self.norm1(self.up(self.neuron1(h_TBC))))))


class Mixer(nn.Module):
    """What stands between two feed-forward blocks."""

    part = "attention"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.neuron, self.projection = LIF(), Linear(channels, channels)

    def forward(self, h_TBC: Tensor) -> Tensor:
        return h_TBC + self.projection(self.neuron(h_TBC))


def blocks(classes: int = 3, *, channels: int = 4, plain: bool = True) -> nn.Sequential:
    """The smallest network with a part "ffn"."""
    torch.manual_seed(0)
    first, mixer = FeedForward(channels, plain=plain), Mixer(channels)
    return nn.Sequential(
        Linear(5, channels), mixer, first, FeedForward(channels), LIF(), Linear(channels, classes)
    )


FFN = ["2.up", "2.down", "3.up", "3.down"]


def bits_of(network: nn.Module) -> list[str]:
    return list(binary_synapses(network))


def test_a_part_is_the_synapses_inside_its_modules_whatever_the_network_is_wrapped_in():
    assert bits_of(binarized(blocks(), part="ffn")) == FFN
    assert bits_of(binarized(blocks(), part="attention")) == ["1.projection"]
    assert bits_of(binarized(late(blocks(), time_steps=2), part="ffn", weights="ir")) == [
        f"0.{name}" for name in FFN
    ]
    assert bits_of(late(binarized(blocks(), part="ffn"), time_steps=2)) == [
        f"0.{name}" for name in FFN
    ]


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (blocks(), ["1.projection", *FFN]),
        (mlp(3, in_features=4, hidden=(5, 6, 7)), ["layers.2", "layers.4"]),
        (convnet(3, stages=((4,), (4, 4))), ["stages.1.0.conv", "stages.1.1.conv"]),
        (convnet(3, stages=((4,), (4,)), head="rate"), ["stages.1.0.conv"]),
        (multi_head(convnet(3, stages=((4,), (4,))), heads=3), ["stages.1.0.conv"]),
        (
            late(multi_head(convnet(3, stages=((4,), (4,))), heads=3), time_steps=2),
            ["0.stages.1.0.conv"],
        ),
        (nn.Sequential(Linear(4, 5), LIF(), Linear(5, 5), LIF(), Linear(5, 3)), ["2"]),
    ],
)
def test_all_but_the_ends(network, expected):
    assert bits_of(binarized(network, part="all_but_ends")) == expected


def test_all_but_the_ends_of_a_resnet():
    network = preact_resnet18_small(width=4, blocks=(1, 1), neuron=LIF())
    layers = [
        name
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    in_shortcuts = [name for name in layers if ".shortcut" in name]
    assert in_shortcuts == ["stages.1.0.shortcut.0"]  # around which nothing leads: they stay real
    assert bits_of(binarized(network, part="all_but_ends")) == [
        name for name in layers[1:-1] if name not in in_shortcuts
    ]


def test_a_packed_headline_network_is_half_its_size():
    """The published size (10-768, FFN of 1 bit): about 122 MB against 260; counted from shapes,
    without memory for them.
    """
    with torch.device("meta"):
        network = qkformer_10(768, shortcut="multiple")
    whole = sum(4 * tensor.numel() for tensor in network.state_dict().values())
    bits = sum(
        synapse.weight.numel()
        for synapse in binary_synapses(binarized(network, part="ffn")).values()
    )
    assert whole / 1e6 == pytest.approx(260, rel=0.01)
    assert (whole - 4 * bits + bits / 8) / 1e6 == pytest.approx(122, rel=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: binarized(nf_resnet18_small(width=4, blocks=(1,)), part="ffn"),
            (
                r"binarized: part must be one that the network has; NFResNet has all_but_ends; got"
                r" part='ffn'"
            ),
        ),
        (lambda: binarized(mlp(), part="ffn"), r"MLP has all_but_ends; got part='ffn'"),
        (
            lambda: binarized(blocks(), part="fnn"),
            r"Sequential has all_but_ends, attention, ffn; got part='fnn'",
        ),
        (
            lambda: binarized(nf_resnet18_small(width=4, blocks=(1,)), part="all_but_ends"),
            (
                r"weights must be plain before they are 1-bit; got standardized weights at"
                r" stages\.0\.0\.branch\.0\.synapse"
            ),
        ),
        (
            lambda: binarized(mlp(hidden=(5,)), part="all_but_ends"),
            r"'all_but_ends' of MLP holds none",
        ),
        (
            lambda: binarized(blocks(plain=False), part="ffn"),
            r"of pipeline\.spiking\.synapse; got Linear at 2\.down",
        ),
        (
            lambda: binarized(fc_feedback(in_features=4, hidden=5), part="all_but_ends"),
            (
                r"weights that are limited in their norm cannot be 1-bit; got"
                r" equilibrium\.feedback\.synapse"
            ),
        ),
        (
            lambda: binarized(binarized(blocks(), part="ffn"), part="ffn"),
            r"plain before they are 1-bit; got 1-bit weights at 2\.up",
        ),
    ],
)
def test_binarized_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("rule", [BPTT(), SLTT(k=2)], ids=lambda rule: rule.label)
@pytest.mark.parametrize("weights", ["scaled", "centred", "ir", "learnable"])
def test_a_part_learns(weights, rule):
    """A few steps of SGD lower the loss, and the latent weights are among what moved; every bit
    still is one.
    """
    network = binarized(blocks(channels=8), part="ffn", weights=weights)
    x_TBC, target_B = 2 * torch.randn(3, 30, 5), torch.arange(30) % 3
    x_TBC = x_TBC + torch.nn.functional.one_hot(target_B, 5)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    rule.attach(network)
    losses = []
    for step in range(8):
        total = 0.0
        for objective in rule.loss_terms(
            network, x_TBC, lambda z: torch.nn.functional.cross_entropy(z, target_B), step=step
        ):
            if objective.backward is not None:
                objective.backward.backward()
            total += objective.loss.item()
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    for name, synapse in binary_synapses(network).items():
        assert (
            not torch.equal(synapse.weight, before[f"{name}.weight"])
            and synapse.weight.isfinite().all()
        )
        assert len(synapse.binarizer(synapse.weight)[0].abs().unique()) == 1  # type: ignore[misc]
    rule.release()


def test_copies_give_the_same_logits():
    network = binarized(blocks(), part="ffn", weights="learnable").eval()
    x_TBC = torch.randn(2, 4, 5)
    with torch.no_grad():
        for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            with fresh_state(network), fresh_state(other):
                assert torch.equal(other(x_TBC), network(x_TBC))


def test_a_recipe_names_it_and_survives_its_json():
    recipe = small_recipe(
        model=spec(
            binarized,
            network=spec(convnet, classes=10, in_channels=1, stages=((4,), (4,))),
            part="all_but_ends",
        )
    )
    assert Recipe.from_json(recipe.to_json()) == recipe
    changed = recipe.override({"model.weights": "ir", "model.network.kernel": 5})
    assert bits_of(changed.model.build()) == ["stages.1.0.conv"]
    with pytest.raises(
        ValueError, match=r"binarized: weights must be one of 'scaled', .*; got 'xnor'"
    ):
        recipe.override({"model.weights": "xnor"})


def test_hlop_refuses_what_is_not_its_parameter():
    network = binarized(mlp(3, in_features=6, hidden=(5, 5)), part="all_but_ends")
    with pytest.raises(
        ValueError, match=r"every layer must be a plain Linear .* got 1-bit weights at layers\.2"
    ):
        HLOP(SLTT(), rows=((1, 1, 1),)).attach(network)
