"""Parts of a network by name, and what cannot be 1-bit."""

# T time, B batch, C channels, K classes

import copy
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.convnet import convnet
from pipeline.models.feedback import fc_feedback
from pipeline.models.mlp import mlp
from pipeline.models.ms_resnet import MSResNet
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.models.preact_resnet import preact_resnet18_small
from pipeline.models.transforms import (
    LateReadout,
    binarized,
    late,
    multi_head,
    select_head,
    synchronized,
    with_readouts,
)
from pipeline.models.vgg import vgg_sws
from pipeline.recipe.recipe import Recipe, spec
from pipeline.rules.bptt import BPTT
from pipeline.rules.hlop import HLOP
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.binary import binary_synapses
from pipeline.spiking.local_learning import Readout
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.synapse import Linear
from tests.helpers.rule_networks import (
    attached,
    batch,
    cross_entropy,
    drawn,
    learn,
    one_batch,
    outputs,
    refusals,
)
from tests.helpers.small import small_recipe


class FeedForward(nn.Sequential):
    part = "ffn"

    def __init__(self, channels: int, *, plain: bool = True) -> None:
        down = Linear if plain else nn.Linear
        layers = {
            "neuron1": LIF(),
            "up": Linear(channels, 4 * channels),
            "norm1": BatchNorm(4 * channels),
            "neuron2": LIF(),
            "down": down(4 * channels, channels),
            "norm2": BatchNorm(channels),
        }
        super().__init__(OrderedDict(layers))

    def forward(self, h_TBC: Tensor) -> Tensor:  # type: ignore[override]
        return h_TBC + super().forward(h_TBC)


class Mixer(nn.Module):
    """What stands between two feed-forward blocks."""

    part = "attention"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.neuron, self.projection = LIF(), Linear(channels, channels)

    def forward(self, h_TBC: Tensor) -> Tensor:
        return h_TBC + self.projection(self.neuron(h_TBC))


def blocks(classes: int = 3, *, channels: int = 4, plain: bool = True) -> nn.Sequential:
    """The smallest network with the parts "attention" and "ffn"."""
    torch.manual_seed(0)
    hidden = (Mixer(channels), FeedForward(channels, plain=plain), FeedForward(channels), LIF())
    return nn.Sequential(Linear(5, channels), *hidden, Linear(channels, classes))


FFN = ["2.up", "2.down", "3.up", "3.down"]


def bits_of(network: nn.Module) -> list[str]:
    return list(binary_synapses(network))


def test_a_part_is_the_synapses_inside_its_modules_whatever_the_network_is_wrapped_in():
    wrapped = [f"0.{name}" for name in FFN]
    assert bits_of(binarized(blocks(), part="ffn")) == FFN
    assert bits_of(binarized(blocks(), part="attention")) == ["1.projection"]
    assert bits_of(binarized(late(blocks(), time_steps=2), part="ffn", weights="ir")) == wrapped
    assert bits_of(late(binarized(blocks(), part="ffn"), time_steps=2)) == wrapped


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
        (  # but for a shortcut, around which nothing leads
            preact_resnet18_small(width=4, blocks=(1, 1)),
            [f"stages.{stage}.0.conv{conv}" for stage in (0, 1) for conv in (1, 2)],
        ),
    ],
)
def test_all_but_the_ends(network, expected):
    assert bits_of(binarized(network, part="all_but_ends")) == expected


HIDDEN_1_BIT = {"in_features": 6, "hidden": (5, 5)}


test_refuses = refusals(
    [
        (
            lambda: binarized(nf_resnet18_small(width=4, blocks=(1,)), part="ffn"),
            (
                r"binarized: part must be a part of the network; NFResNet has all_but_ends; got"
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
            r"'all_but_ends' of MLP has none",
        ),
        (
            lambda: binarized(blocks(plain=False), part="ffn"),
            r"of pipeline\.spiking\.synapse; got Linear at 2\.down",
        ),
        (
            lambda: binarized(fc_feedback(in_features=4, hidden=5), part="all_but_ends"),
            (
                r"weights with a limited norm cannot be 1-bit; got"
                r" equilibrium\.feedback\.synapse"
            ),
        ),
        (
            lambda: binarized(binarized(blocks(), part="ffn"), part="ffn"),
            r"plain before they are 1-bit; got 1-bit weights at 2\.up",
        ),
        (
            lambda: recipe_of(**{"model.weights": "xnor"}),
            r"binarized: weights must be one of 'scaled', .*; got 'xnor'",
        ),
        (
            lambda: attached(
                HLOP(SLTT(), rows=((1, 1, 1),)),
                binarized(mlp(3, **HIDDEN_1_BIT), part="all_but_ends"),
            ),
            r"every layer must be a Linear or Conv2d .* got 1-bit weights at layers\.2",
        ),
        (
            lambda: multi_head(nn.Linear(2, 2), heads=2),
            r"module `classifier`; got heads=2, Linear",
        ),
        (lambda: multi_head(mlp(3, in_features=4), heads=0), "got heads=0, MLP"),
        (lambda: select_head(small(), 3), r"head must be in 0\.\.2; got 3"),
        (
            lambda: select_head(mlp(3, in_features=4), 0),
            "must have several heads, see multi_head; got MLP",
        ),
        *[
            (
                lambda share=share: LateReadout(share=share, time_steps=T),
                rf"LateReadout: share must be in 0\.\.1, 0 excluded; got share={share}",
            )
            for share in (0.0, 1.1)
        ],
        (
            lambda: outputs(LateReadout(share=0.5, time_steps=2), torch.zeros(3, B, K)),
            "LateReadout: a recording must have 2 time steps; got step 3",
        ),
        (
            lambda: with_readouts(mlp(4), 5),
            "with_readouts: classes must be the network's number of outputs, 4; got classes=5",
        ),
        (
            lambda: with_readouts(mlp(4), 4, cells=(1, 1, 1)),
            (
                r"with_readouts: cells must be one number, or one number for each of the 2 neurons;"
                r" got \[1, 1, 1\]"
            ),
        ),
        (
            lambda: with_readouts(mlp(4, neuron=nn.ReLU()), 4),
            "with_readouts: the network must have LIF neurons; got MLP",
        ),
        (
            lambda: with_readouts(nn.Sequential(LIF(), Linear(2, 4)), 4),
            "with_readouts: a synapse must be registered before each neuron; got none before 0",
        ),
        (
            lambda: synchronized(convnet(norm="none")),
            "synchronized: the network must have batch norm; got ConvNet without any",
        ),
    ]
)


@pytest.mark.parametrize("rule", [BPTT(), SLTT(k=2)], ids=lambda rule: rule.label)
@pytest.mark.parametrize("weights", ["scaled", "centred", "ir", "learnable"])
def test_a_part_learns(weights, rule):
    """A few steps of SGD lower the loss, and the latent weights are among what moved; every bit
    still is one.
    """
    network = binarized(blocks(channels=8), part="ffn", weights=weights)
    target_B = torch.arange(30) % 3
    x_TBC = 2 * torch.randn(3, 30, 5) + nn.functional.one_hot(target_B, 5)
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    rule.attach(network)
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        seen = learn(rule.loss_terms(network, x_TBC, cross_entropy(target_B), step=step))
        losses.append(sum(objective.loss.item() for objective in seen))
        optimizer.step()
    rule.release()
    assert losses[-1] < 0.9 * losses[0]
    for name, synapse in binary_synapses(network).items():
        assert not torch.equal(synapse.weight, before[f"{name}.weight"])
        assert synapse.weight.isfinite().all()
        assert len(synapse.binarizer(synapse.weight)[0].abs().unique()) == 1  # type: ignore[misc]


def test_copies_give_the_same_logits():
    network = binarized(blocks(), part="ffn", weights="learnable").eval()
    x_TBC = torch.randn(2, 4, 5)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(outputs(other, x_TBC), outputs(network, x_TBC))


def recipe_of(**changes: Any) -> Recipe:
    network = spec(convnet, classes=10, in_channels=1, stages=((4,), (4,)))
    recipe = small_recipe(model=spec(binarized, network=network, part="all_but_ends"))
    assert Recipe.from_json(recipe.to_json()) == recipe
    return recipe.override(changes)


def test_a_recipe_names_it_and_survives_its_json():
    changed = recipe_of(**{"model.weights": "ir", "model.network.kernel": 5})
    assert bits_of(changed.model.build()) == ["stages.1.0.conv"]


# ------------------------------------------------------------------------------------------- heads


def small() -> Any:
    torch.manual_seed(0)
    return multi_head(mlp(3, in_features=4, hidden=(5,)), heads=3)


def test_the_selected_head_answers_and_learns_alone() -> None:
    network, x_TB = small(), torch.randn(2, 6, 4)
    for index, head in enumerate(network.classifier.heads):
        nn.init.constant_(head.weight, index + 1.0)
        nn.init.zeros_(head.bias)
    first = outputs(network, x_TB)
    for index in (2, 0, 1):
        select_head(nn.Sequential(network), index)  # it reaches into a wrapped network
        torch.testing.assert_close(outputs(network, x_TB), (index + 1) * first)
    outputs(network, x_TB, grad=True).square().sum().backward()
    learnt = [head.weight.grad is not None for head in network.classifier.heads]
    assert learnt == [False, True, False]


def test_heads_begin_alike_with_weights_of_their_own_whichever_is_selected() -> None:
    one, other = small(), small()
    select_head(other, 2)
    one.load_state_dict(other.state_dict())
    assert one.classifier.selected == 0
    names = [
        f"classifier.heads.{index}.{part}" for index in range(3) for part in ("weight", "bias")
    ]
    assert [key for key in one.state_dict() if "classifier" in key] == names
    weights = [head.weight for head in one.classifier.heads]
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    assert len({weight.data_ptr() for weight in weights}) == 3


@pytest.mark.parametrize(
    "network",
    [nf_resnet18_small(2, in_channels=1, width=4, blocks=(1,)), vgg_sws(2, stages=((4,), (4,)))],
)
def test_every_network_with_a_classifier_may_have_heads(network: nn.Module) -> None:
    channels = next(network.parameters()).shape[1]
    several = multi_head(network, heads=2)
    select_head(nn.Sequential(several), 1)
    assert outputs(several, torch.randn(2, 3, channels, 8, 8)).shape == (2, 3, 2)


# -------------------------------------------------------------------------------------------- late


T, B, K = 6, 5, 3


def network() -> nn.Module:
    return late(drawn(nn.Sequential(Linear(6, 8), LIF(0.9), Linear(8, K)), seed=0), time_steps=T)


@pytest.mark.parametrize(("share", "heard"), [(0.5, 3), (1 / 3, 2), (0.01, 1), (1.0, 6)])
def test_the_last_steps_are_scaled_and_the_others_silent(share: float, heard: int) -> None:
    x_TBK = torch.randn(T, B, K)
    y_TBK = outputs(LateReadout(share=share, time_steps=T), x_TBK)
    assert torch.equal(y_TBK[: T - heard], torch.zeros(T - heard, B, K))
    torch.testing.assert_close(y_TBK[T - heard :], x_TBK[T - heard :] * T / heard)
    torch.testing.assert_close(y_TBK.mean(0), x_TBK[T - heard :].mean(0))


@pytest.mark.parametrize("sizes", [[1] * T, [2, 3, 1], [5, 1]])
def test_slices_continue_one_another_and_each_batch_begins_anew(sizes: list[int]) -> None:
    readout, x_TBK = LateReadout(share=0.5, time_steps=T), torch.randn(T, B, K)
    whole = outputs(readout, x_TBK)
    for _ in range(2):
        assert torch.equal(outputs(readout, *x_TBK.split(sizes)), whole)


@pytest.mark.parametrize(
    "rule",
    [BPTT(), BPTT(recompute=True), SLTT(), OTTT()],
    ids=["BPTT", "recomputed", "SLTT", "OTTT"],
)
def test_the_loss_is_that_of_the_late_steps_and_a_constant(rule: BPTT | SLTT | OTTT) -> None:
    model, (x_TB, target_B) = network(), batch(T)
    late_TBK = outputs(model, x_TB)[T // 2 :]
    expected = sum(nn.functional.cross_entropy(logits_BK, target_B) for logits_BK in late_TBK) / T
    seen = one_batch(rule, model, T)
    loss, logits_BK = (torch.stack([getattr(o, name) for o in seen]) for name in ("loss", "logits"))
    torch.testing.assert_close(loss.sum(), expected + math.log(K) / 2)
    torch.testing.assert_close(logits_BK.sum(0), late_TBK.sum(0) / T)


@pytest.mark.parametrize(("rule", "sees"), [(BPTT(), True), (SLTT(), False)])
def test_gradients_reach_the_past_through_time_alone(rule, sees) -> None:
    """The only way back from the late steps to an early input is the membrane: BPTT sees it, SLTT
    does not.
    """
    (rule, model), (x_TB, target_B) = attached(rule, network()), batch(T)
    x_TB.requires_grad_()
    learn(rule.loss_terms(model, x_TB, cross_entropy(target_B)))
    assert bool(x_TB.grad[0].any()) == sees and bool(x_TB.grad[-1].any())  # type: ignore[index]


# ---------------------------------------------------------------------------------------- readouts


@pytest.mark.parametrize(("cells", "each"), [(1, [1] * 3), (2, [2] * 3), ((4, 2, 1), [4, 2, 1])])
def test_the_network_is_as_it_was(cells, each):
    """The weights of the network are drawn first, so they do not know of the readouts."""
    found = []
    for change in (lambda network: network, lambda network: with_readouts(network, 4, cells=cells)):
        torch.manual_seed(0)
        found.append(change(vgg_sws(4, in_channels=1, stages=((3, 5), (6,)))))
    assert torch.equal(*(outputs(network, torch.ones(3, 2, 1, 8, 8)) for network in found))
    readouts = [module for module in found[1].modules() if isinstance(module, Readout)]
    assert [(readout.channels, readout.cells) for readout in readouts] == list(
        zip((3, 5, 6), each, strict=True)
    )
    before, after = (dict(network.named_parameters()) for network in found)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert len(after) == len(before) + 2 * 3


def test_layers_without_an_image_have_one_place():
    network = with_readouts(mlp(4, in_features=6, hidden=(8, 7)), 4, cells=3)
    readouts = [module for module in network.modules() if isinstance(module, Readout)]
    assert [readout.linear.in_features for readout in readouts] == [8, 7]
    assert readouts[0].logits(torch.ones(1, 2, 8)).shape == (1, 2, 4)


# ------------------------------------------------------------------------------------ synchronized


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convnet": lambda: convnet(3, in_channels=1, stages=((4,), (4,)), head="rate"),
    "preact": lambda: preact_resnet18_small(3, in_channels=1, width=4, blocks=(1, 1)),
    "ms": lambda: MSResNet(blocks=(1, 1), classes=3, in_channels=1, width=4),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_batch_norm_asks_all_workers_and_no_key_is_another(name: str) -> None:
    network = NETWORKS[name]()
    before = list(network.state_dict())
    assert synchronized(network) is network and list(network.state_dict()) == before
    norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
    assert len(norms) >= 3 and all(norm.between == "world" for norm in norms)


def test_a_recipe_may_say_so_and_is_another_study() -> None:
    network = spec(convnet, classes=10, in_channels=1, stages=((4,),))
    alone, together = (
        small_recipe(model=network),
        small_recipe(model=spec(synchronized, network=network)),
    )
    assert Recipe.from_json(together.to_json()) == together
    assert alone.study_key({}) != together.study_key({})
