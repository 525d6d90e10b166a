"""Parts of a network by name, and what cannot be 1-bit."""

# T time, B batch, C channels, K classes

import copy
import math
import pickle
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
from pipeline.models.qkformer import qkformer_10
from pipeline.models.transforms import (
    LateReadout,
    MultiHead,
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
from pipeline.spiking.state import fresh_state
from pipeline.spiking.synapse import Linear
from pipeline.train.objective import CrossEntropy
from tests.helpers.rule_networks import outputs
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
def test_refuses(call, message):
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


# ------------------------------------------------------------------------------------------- heads


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


def test_heads_refuses() -> None:
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


# -------------------------------------------------------------------------------------------- late


T, B, K = 6, 5, 3


def network(share: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    return late(
        nn.Sequential(Linear(4, 8), LIF(0.9), Linear(8, K)), share=share, time_steps=T
    ).double()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(T, B, 4, generator=generator, dtype=torch.float64), torch.arange(B) % K


@pytest.mark.parametrize(("share", "heard"), [(0.5, 3), (1 / 3, 2), (0.01, 1), (1.0, 6)])
def test_the_last_steps_are_scaled_and_the_others_silent(share: float, heard: int) -> None:
    readout, x_TBK = LateReadout(share=share, time_steps=T), torch.randn(T, B, K)
    y_TBK = outputs(readout, x_TBK, grad=True)
    assert torch.equal(y_TBK[: T - heard], torch.zeros(T - heard, B, K))
    torch.testing.assert_close(y_TBK[T - heard :], x_TBK[T - heard :] * T / heard)
    torch.testing.assert_close(y_TBK.mean(0), x_TBK[T - heard :].mean(0))


@pytest.mark.parametrize("sizes", [[1] * T, [2, 3, 1], [5, 1]])
def test_slices_continue_one_another_and_each_batch_begins_anew(sizes: list[int]) -> None:
    readout, x_TBK = LateReadout(share=0.5, time_steps=T), torch.randn(T, B, K)
    whole = outputs(readout, x_TBK, grad=True)
    for _ in range(2):
        with fresh_state(readout):
            assert torch.equal(torch.cat([readout(x_cBK) for x_cBK in x_TBK.split(sizes)]), whole)


@pytest.mark.parametrize(
    "rule",
    [BPTT(), BPTT(recompute=True), SLTT(), OTTT()],
    ids=["BPTT", "recomputed", "SLTT", "OTTT"],
)
def test_the_loss_is_that_of_the_late_steps_and_a_constant(rule: BPTT | SLTT | OTTT) -> None:
    model, (x_TB, target_B) = network(), inputs()
    late_TBK = outputs(model, x_TB, grad=True)[T // 2 :]
    expected = sum(nn.functional.cross_entropy(logits_BK, target_B) for logits_BK in late_TBK) / T
    rule.attach(model)
    shares = list(rule.loss_terms(model, x_TB, CrossEntropy()(target_B)))
    torch.testing.assert_close(
        torch.stack([each.loss for each in shares]).sum(), expected + math.log(K) / 2
    )
    torch.testing.assert_close(
        torch.stack([each.logits for each in shares]).sum(0), late_TBK.detach().sum(0) / T
    )


def test_gradients_reach_the_past_through_time_alone() -> None:
    """The only way back from the late steps to an early input is the membrane: BPTT sees it, SLTT
    does not.
    """
    x_TB, target_B = inputs()
    for rule, sees in ((BPTT(), True), (SLTT(), False)):
        model = network()
        rule.attach(model)
        x = x_TB.clone().requires_grad_()
        for each in rule.loss_terms(model, x, CrossEntropy()(target_B)):
            assert each.backward is not None
            each.backward.backward()
        assert x.grad is not None and bool(x.grad[0].any()) == sees and bool(x.grad[-1].any())


def test_what_cannot_be_is_refused() -> None:
    for share in (0.0, 1.1):
        with pytest.raises(
            ValueError,
            match=rf"LateReadout: share must be in 0\.\.1, 0 excluded; got share={share}",
        ):
            LateReadout(share=share, time_steps=T)
    readout = LateReadout(share=0.5, time_steps=2)
    with (
        pytest.raises(
            ValueError, match="LateReadout: a recording must have 2 time steps; got step 3"
        ),
        fresh_state(readout),
    ):
        readout(torch.zeros(3, B, K))


# ---------------------------------------------------------------------------------------- readouts


@pytest.mark.parametrize("cells", [1, 2, (4, 2, 1)])
def test_the_network_is_as_it_was(cells):
    found = []
    for change in (lambda network: network, lambda network: with_readouts(network, 4, cells=cells)):
        torch.manual_seed(0)
        network = change(vgg_sws(4, in_channels=1, stages=((3, 5), (6,))))
        with torch.no_grad(), fresh_state(network):
            found.append((network(torch.ones(3, 2, 1, 8, 8)), network))
    (plain, before), (read, after) = found
    assert torch.equal(plain, read)
    readouts = [module for module in after.modules() if isinstance(module, Readout)]
    assert [readout.channels for readout in readouts] == [3, 5, 6]
    assert [readout.cells for readout in readouts] == list(
        cells if isinstance(cells, tuple) else (cells,) * 3
    )
    # The weights of the network are drawn first, so they do not know of the readouts.
    names = {name for name, _ in before.named_parameters()}
    assert all(
        torch.equal(value, dict(before.named_parameters())[n])
        for n, value in after.named_parameters()
        if n in names
    )
    assert len(list(after.parameters())) == len(names) + 2 * 3


def test_layers_without_an_image_have_one_place():
    network = with_readouts(mlp(4, in_features=6, hidden=(8, 7)), 4, cells=3)
    readouts = [module for module in network.modules() if isinstance(module, Readout)]
    assert [readout.linear.in_features for readout in readouts] == [8, 7]
    with torch.no_grad(), fresh_state(network):
        assert readouts[0].logits(network.layers[0](torch.ones(1, 2, 6))).shape == (1, 2, 4)  # type: ignore[index]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: with_readouts(mlp(4), 5),
            "with_readouts: classes must be those of the network; got 5, and 4 outputs",
        ),
        (
            lambda: with_readouts(mlp(4), 4, cells=(1, 1, 1)),
            (
                r"with_readouts: cells must be one number, or one for each of 2 neurons; got \[1,"
                r" 1, 1\]"
            ),
        ),
        (
            lambda: with_readouts(mlp(4, neuron=nn.ReLU()), 4),
            "with_readouts: the network must have LIF neurons; got MLP",
        ),
        (
            lambda: with_readouts(nn.Sequential(LIF(), Linear(2, 4)), 4),
            "with_readouts: a synapse must stand in front of each neuron; got none before 0",
        ),
    ],
)
def test_readouts_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()


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


def test_refuses_a_network_without_batch_norm() -> None:
    with pytest.raises(
        ValueError, match="synchronized: the network must have batch norm; got ConvNet without any"
    ):
        synchronized(convnet(norm="none"))
