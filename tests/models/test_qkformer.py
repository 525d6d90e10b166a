from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pipeline.measure.activity import Activity
from pipeline.models.attention import OverSamples, SelfAttention, TokenQK, block
from pipeline.models.published import to_published
from pipeline.models.qkformer import QKFormer, from_published, qkformer_10
from pipeline.models.residual import BlockFactory
from pipeline.models.transforms import binarized
from pipeline.spiking.binary import binary_synapses
from pipeline.spiking.dropout import DropPath
from pipeline.spiking.encode import repeat
from pipeline.spiking.neuron import LIF, named_neurons
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.surrogate import Sigmoid
from tests.helpers.families import small_qkformer
from tests.helpers.rule_networks import outputs, refusals
from tests.helpers.step_by_step import StepByStep


@pytest.mark.parametrize("shortcut", ["membrane", "multiple"])
def test_fresh_blocks_on_a_stream_of_real_numbers_are_the_identity(shortcut):
    """In training mode, whatever the stream; and every one of them can leave it: its last gains
    have a gradient.
    """
    blocks = BlockFactory(shortcut=shortcut, neuron=LIF(0.5, surrogate=Sigmoid(4.0)))
    for attention in (TokenQK, SelfAttention):
        mixing = partial(attention, blocks, 16, heads=2)
        made = block(blocks, 16, mixing, expansion=4, drop_path=0.0)
        x_TBCHW = 3 * torch.randn(2, 3, 16, 8, 8)
        y_TBCHW = outputs(made, x_TBCHW, grad=True)
        assert torch.allclose(y_TBCHW, x_TBCHW, atol=1e-6)
        (y_TBCHW * torch.randn_like(y_TBCHW)).sum().backward()
        last = [
            norm.weight
            for norm in made.modules()
            if isinstance(norm, BatchNorm) and not norm.weight.any()
        ]
        assert len(last) == (2 if shortcut == "membrane" else 3)
        assert all(weight.grad is not None and weight.grad.any() for weight in last)


@pytest.mark.parametrize("shortcut", ["sew", "multiple"])
def test_ffn_is_half_of_it_and_can_be_binary(shortcut):
    """By the published sizes 35.7 of 64.96 M weights are the FFN's."""
    with torch.device("meta"):
        chosen = binary_synapses(binarized(qkformer_10(768, shortcut=shortcut), part="ffn"))
    assert len(chosen) == 2 * 10 and all(".ffn." in name for name in chosen)
    assert (
        sum(synapse.weight.numel() for synapse in chosen.values())
        == 7 * 8 * 768**2 + 2 * 8 * 384**2 + 8 * 192**2
        == 35_684_352
    )


class Reference(StepByStep):
    """QKFormer, with two blocks in the last stage."""

    def embed(self, name: str, first: str, second: str, x: torch.Tensor) -> torch.Tensor:
        h = self.lif(name + first, F.max_pool2d(self.conv_bn(name + first, x), 3, 2, 1))
        h = self.lif(name + second, self.conv_bn(name + second, h))
        return h + self.lif(name + "res", self.conv_bn(name + "proj_res", x, 2))

    def block(self, name: str, attention: str, x: torch.Tensor) -> torch.Tensor:
        at = f"{name}.{attention}."
        a = (self.token_qk if attention == "tssa" else self.self_attention)(at, x)
        x = x + self.lif(at + "proj", self.conv_bn(at + "proj", a))
        h = self.lif(name + "1", self.conv_bn(name + ".mlp.fc1", x))
        return x + self.lif(name + "2", self.conv_bn(name + ".mlp.fc2", h))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lif("stem", F.max_pool2d(self.conv_bn("patch_embed1.proj", x), 3, 2, 1))
        x = self.embed("patch_embed1.", "proj1", "proj2", x)
        x = self.block("stage1.0", "tssa", x)
        x = self.embed("patch_embed2.", "proj3", "proj4", x)
        for i in range(2):
            x = self.block(f"stage2.{i}", "tssa", x)
        x = self.embed("patch_embed3.", "proj3", "proj4", x)
        for i in range(2):
            x = self.block(f"stage3.{i}", "attn", x)
        return self.head(x.mean((2, 3)))


def test_against_an_independent_forward():
    model = small_qkformer(depth=5).double().eval()
    x_BCHW = 2 * torch.randn(2, 3, 48, 40, dtype=torch.float64)
    reference = Reference(to_published(model), heads=2)
    with torch.no_grad():
        expected_TBK = torch.stack([reference(x_BCHW) for _ in range(3)])
    assert (outputs(model, repeat(x_BCHW, 3)) - expected_TBK).abs().max() < 1e-12
    assert not torch.equal(expected_TBK[0], expected_TBK[2])  # membranes carry over
    assert len(reference.membranes) == len(named_neurons(model))


class AsPublished(Reference):
    """The published code: the neuron behind an attention of the last stage is handed T B samples in
    the place of T steps.
    """

    def lif(self, key: str, x: torch.Tensor, threshold: float = 1.0) -> torch.Tensor:
        if ".attn.proj" not in key:
            return super().lif(key, x, threshold)
        return torch.cat(
            [super(AsPublished, self).lif(key, sample[None], threshold) for sample in x]
        )


def test_the_published_projection_neuron_runs_from_sample_to_sample():
    model = small_qkformer(depth=5, projection_neuron="over_samples").double().eval()
    x_BCHW = 2 * torch.randn(3, 3, 48, 40, dtype=torch.float64)
    reference, x_TBCHW = AsPublished(to_published(model), heads=2), repeat(x_BCHW, 3)
    with torch.no_grad():
        expected_TBK = torch.stack([reference(x_BCHW) for _ in range(3)])
    turned_TBK = outputs(model, repeat(x_BCHW.flip(0), 3)).flip(1)
    assert (outputs(model, x_TBCHW) - expected_TBK).abs().max() < 1e-12
    assert (outputs(model, *x_TBCHW.split(1)) - expected_TBK).abs().max() < 1e-12
    assert (turned_TBK - expected_TBK).abs().max() > 1e-3  # the order within the batch counts
    with (activity := Activity(model)), activity.batch(torch.arange(3)):
        outputs(model, x_TBCHW)
    # Spikes are counted by sample.
    assert [each.samples for each in activity.layers()] == [3] * len(named_neurons(model))
    alone = small_qkformer(depth=5).double().eval()
    # A batch of one is the mended function.
    assert torch.equal(outputs(model, x_TBCHW[:, :1]), outputs(alone, x_TBCHW[:, :1]))


@pytest.mark.parametrize(("shortcut", "norm"), [("sew", "batch"), ("multiple", "sws")])
def test_a_shrunk_picture_is_the_mean_of_squares(shortcut, norm):
    model, shrunk = (small_qkformer(shortcut, norm, shrink=s).eval() for s in (1, 2))
    assert list(model.state_dict()) == list(shrunk.state_dict())
    x_BCHW = torch.randn(2, 3, 64, 64)
    mean_BCHW = sum(x_BCHW[..., i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    one, other = outputs(model, repeat(mean_BCHW, 2)), outputs(shrunk, repeat(x_BCHW, 2))
    assert (one - other).abs().max() < 1e-5 and one.std() > 0


@pytest.mark.parametrize(
    ("shrink", "side"), [(1, 1), (1, 8), (1, 9), (4, 4), (4, 7), (4, 33), (2, 33)]
)
def test_any_size_that_leaves_a_pixel(shrink, side):
    """What fills no square is left out."""
    model, x_TBCHW = small_qkformer(shrink=shrink).eval(), torch.rand(2, 2, 3, side, side)
    y_TBK, whole = outputs(model, x_TBCHW), side // shrink * shrink
    assert y_TBK.shape == (2, 2, 5)
    assert torch.equal(y_TBK, outputs(model, x_TBCHW[..., :whole, :whole]))


def test_drop_path_grows_with_depth_and_works():
    model, x_TBCHW = small_qkformer(depth=6, drop_path=0.5), repeat(torch.randn(2, 3, 32, 32), 2)
    shares = [round(m.share, 3) for m in model.modules() if isinstance(m, DropPath)]
    assert shares == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5]
    for mode in (True, False):
        one, other = (outputs(model.train(mode), x_TBCHW) for _ in range(2))
        assert torch.equal(one, other) == (not mode)


test_refuses = refusals(
    [
        ({"channels": 36}, r"channels must be a multiple of 4 \* heads; got channels=36, heads=2"),
        ({"depth": 3}, "depth must be >= 4"),
        ({"classes": 0}, "classes must be a whole number >= 1; got classes=0"),
        ({"shrink": 0}, "shrink must be a whole number >= 1; got shrink=0"),
        (
            {"projection_neuron": "steps"},
            "projection_neuron must be 'over_time' or 'over_samples'; got .*'steps'",
        ),
        (
            {"projection_neuron": "over_samples", "shortcut": "membrane"},
            (
                "projection_neuron='over_samples' needs a neuron after the attention, .* got"
                " shortcut='membrane'"
            ),
        ),
        ({"shortcut": "post_activation"}, "shortcut must not be 'post_activation'"),
        (
            {"shortcut": "some"},
            "shortcut must be 'post_activation', .* or 'multiple_all'; got shortcut='some'",
        ),
        ({"norm": "sws"}, "norm='sws' needs shortcut='membrane' or 'multiple'"),
        ({"norm": "layer"}, "norm must be 'batch' or 'sws'; got norm='layer'"),
    ],
    small_qkformer,
)


# --------------------------------------------------------------------------------------- published


GOLDEN = Path(__file__).parents[1] / "golden" / "qkformer_10_384.txt"


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        weights = to_published(qkformer_10(384))
    ours = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    lines = (line.split() for line in GOLDEN.read_text().splitlines())
    theirs = {name: tuple(map(int, shape)) for name, *shape in lines}
    assert len(ours) == 367
    assert ours == {k: v for k, v in theirs.items() if not k.endswith("num_batches_tracked")}


torch.manual_seed(0)
SMALL = QKFormer(channels=64, depth=5, heads=1, classes=7, in_channels=2).eval()
WEIGHTS = to_published(SMALL)


def test_there_and_back():
    counter = {"patch_embed1.proj_bn.num_batches_tracked": torch.tensor(3)}
    again = from_published(WEIGHTS | counter).eval()
    assert again.state_dict().keys() == SMALL.state_dict().keys()
    x_TBCHW = repeat(torch.randn(2, 2, 32, 32), 2)
    assert torch.equal(outputs(SMALL, x_TBCHW), outputs(again, x_TBCHW))


@pytest.mark.parametrize(
    ("choices", "over", "neuron"),
    [
        ({}, "time", LIF),
        ({"over": "step"}, "step", LIF),
        ({"projection_neuron": "over_samples"}, "time", OverSamples),
    ],
)
def test_published_weights_are_of_statistics_over_time_and_the_mended_neuron_unless_chosen(
    choices, over, neuron
):
    """In a batch, the published function is another one; the weights and their names are the
    same.
    """
    network = from_published(WEIGHTS, **choices)
    assert to_published(network).keys() == WEIGHTS.keys()
    norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
    assert len(norms) > 20 and {norm.over for norm in norms} == {over}
    attentions = [each for each in network.modules() if isinstance(each, SelfAttention)]
    assert [type(each.last) for each in attentions] == [neuron] * 2


def without(key: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in WEIGHTS.items() if name != key}


test_refuses_what_does_not_fit = refusals(
    [
        (
            lambda: from_published(without("head.weight")),
            r"the tensor 'head.weight' must have 2 dimensions; got none",
        ),
        (
            lambda: from_published(without("stage2.1.mlp.fc2_bn.bias")),
            r"got 1 missing: stages\.1\.2\.ffn\.branch\.2\.norm\.bias",
        ),
        (
            lambda: from_published(WEIGHTS | {"pos_embed": torch.zeros(1)}),
            r"got 1 unknown: pos_embed",
        ),
        (
            lambda: from_published(WEIGHTS | {"head.bias": torch.zeros(8)}),
            r"got 1 of another shape: classifier.bias \(\[8\] instead of \[7\]\)",
        ),
        (
            lambda: from_published(WEIGHTS | {"head.weight": torch.zeros(7)}),
            r"'head.weight' must have 2 dimensions; got \(7,\)",
        ),
        (
            lambda: from_published(WEIGHTS | {"head.weight": torch.zeros(7, 36)}),
            "heads must be set for fewer than 64 channels; got 36 channels",
        ),
        (
            lambda: to_published(small_qkformer("membrane")),
            "the network must have the form of a published one; got QKFormer without published",
        ),
        (
            lambda: outputs(small_qkformer(shrink=4), torch.rand(2, 2, 3, 8, 3)),
            r"QKFormer: an image must have at least shrink=4 pixels a side; got \(8, 3\)$",
        ),
    ]
)
