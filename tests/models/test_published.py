"""Networks with published weights: names and shapes, and their forwards written out."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models import (
    e_spikeformer,
    max_former,
    meta_spikeformer,
    ms_resnet,
    nf_resnet,
    preact_resnet,
    qkformer,
    sew_resnet,
    spike_driven_transformer,
    spikformer,
)
from pipeline.models.published import to_published
from pipeline.models.spike_driven_transformer import SpikeDrivenTransformer
from pipeline.models.spikformer import Spikformer
from pipeline.spiking.encode import repeat
from pipeline.spiking.neuron import named_neurons
from pipeline.spiking.norm import batch_norms
from tests.helpers.families import STAGES, TRANSFORMERS
from tests.helpers.rule_networks import outputs, refusals
from tests.helpers.small import Done
from tests.helpers.step_by_step import StepByStep

GOLDEN = Path(__file__).parents[1] / "golden"


class SpikformerByHand(StepByStep):
    def __call__(self, x: Tensor) -> Tensor:
        for index in ("", "1", "2", "3"):
            h = self.norm(
                f"patch_embed.proj_bn{index}", self.conv(f"patch_embed.proj_conv{index}", x)
            )
            x = F.max_pool2d(self.lif(f"stem{index}", h), 3, 2, 1)
        x = x + self.lif("rpe", self.conv_bn("patch_embed.rpe", x))
        for i in range(2):
            at = f"block.{i}.attn."
            x = x + self.lif(at + "proj", self.conv_bn(at + "proj", self.self_attention(at, x)))
            h = self.lif(f"{i}1", self.conv_bn(f"block.{i}.mlp.fc1", x))
            x = x + self.lif(f"{i}2", self.conv_bn(f"block.{i}.mlp.fc2", h))
        return self.head(x.mean((2, 3)))


class SpikeDrivenByHand(StepByStep):
    def __call__(self, x: Tensor) -> Tensor:
        for index in ("", "1", "2", "3"):
            x = self.norm(
                f"patch_embed.proj_bn{index}", self.conv(f"patch_embed.proj_conv{index}", x)
            )
            x = self.lif(f"stem{index}", x) if index != "3" else x
            x = F.max_pool2d(x, 3, 2, 1)
        x = x + self.conv_bn("patch_embed.rpe", self.lif("rpe", x))
        for i in range(2):
            at = f"block.{i}.attn."
            h = self.channel_mask(at, self.lif(at + "first", x))
            x = self.membrane_mlp(f"block.{i}", x + self.conv_bn(at + "proj", h))
        return self.head(self.lif("head", x.mean((2, 3))))


class MaxFormerByHand(StepByStep):
    def embed(self, at: str, x: Tensor, names: list[str], strides: tuple[int, int, int]) -> Tensor:
        """`names` of two layers and the shortcut. A stride of 0 is a max pool."""

        def layer(index: int, x: Tensor) -> Tensor:
            y = self.conv_bn(at + names[index], x, strides[index] or 1)
            return y if strides[index] else F.max_pool2d(y, 3, 2, 1)

        x = self.lif(at + "first", x)
        return layer(1, self.lif(at + "second", layer(0, x))) + layer(2, x)

    def mixed(self, name: str, x: Tensor) -> Tensor:
        at = f"{name}.attn."
        if at + "q_conv.weight" in self.w:
            mix = self.self_attention if at + "v_conv.weight" in self.w else self.token_qk
            x = x + self.conv_bn(at + "proj", mix(at, self.lif(at + "first", x)))
        else:
            conv = "conv5" if f"{name}.mixer.conv5.weight" in self.w else "conv"
            h = self.conv(f"{name}.mixer.{conv}", self.lif(at + "first", x))
            x = x + self.norm(f"{name}.mixer.{conv}_bn", h)
        return self.membrane_mlp(name, x)

    def after_stem(self, x: Tensor, first: Any, other: Any) -> Tensor:
        for stage, depth in enumerate((1, 2, 7), 1):
            x = self.embed(f"patch_embed{stage}.", x, *(first if stage == 1 else other))
            for index in range(depth):
                x = self.mixed(f"stage{stage}.{index}", x)
        return self.head(self.lif("head", x.mean((2, 3))))

    def __call__(self, x: Tensor) -> Tensor:
        x = self.conv_bn("patch_embed1.embed1.embed", x, 2)
        names = [f"{layer}.embed" for layer in ("max_embed1", "embed1", "max_embed2")]
        first = [f"embed{index}.embed" for index in (2, 3, 4)]
        return self.after_stem(x, (first, (2, 1, 2)), (names, (0, 1, 0)))


class MSQKFormerByHand(MaxFormerByHand):
    def conv_bn(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        """In the first embedding the index is at the end of the name."""
        if not name.startswith("patch_embed1.proj") or not name[-1].isdigit():
            return super().conv_bn(name, x, stride)
        conv, bn = (f"{name[:-1]}_{kind}{name[-1]}" for kind in ("conv", "bn"))
        return self.norm(bn, self.conv(conv, x, stride))

    def __call__(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv_bn("patch_embed1.proj", x), 3, 2, 1)
        strides = (0, 1, 2)
        first, other = ["proj1", "proj2", "rpe"], ["proj3", "proj4", "proj_res"]
        return self.after_stem(x, (first, strides), (other, strides))


class MetaByHand(StepByStep):
    def downsample(self, at: str, x: Tensor, stride: int = 2) -> Tensor:
        x = x if at == "downsample1_1" else self.lif(at, x)
        return self.conv_bn(f"{at}.encode", x, stride)

    def conv_block(self, at: str, x: Tensor) -> Tensor:
        h = self.norm(at + "Conv.bn1", self.conv(at + "Conv.pwconv1", self.lif(at + "a", x)))
        h = self.conv(at + "Conv.dwconv", self.lif(at + "b", h))
        x = x + self.norm(at + "Conv.bn2", self.conv(at + "Conv.pwconv2", h))
        h = self.norm(at + "bn1", self.conv(at + "conv1", self.lif(at + "c", x)))
        return x + self.norm(at + "bn2", self.conv(at + "conv2", self.lif(at + "d", h)))

    def conv_bn(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        """A RepConv adds a frame of what its first norm makes of 0."""
        at = name + "_conv.0.body."
        if at + "0.weight" not in self.w:
            return super().conv_bn(name, x, stride)
        x = self.norm(at + "1.bn", F.pad(self.conv(at + "0", x), (1, 1, 1, 1)))
        x = self.conv(at + "2.1", self.conv(at + "2.0", x, padding=0))
        return self.norm(name + "_conv.1", self.norm(at + "2.2", x))

    def attention_block(self, name: str, x: Tensor) -> Tensor:
        at = f"{name}.attn."
        h = self.self_attention(at, self.lif(at + "first", x))
        return self.membrane_mlp(name, x + self.conv_bn(at + "proj", h))

    def __call__(self, x: Tensor) -> Tensor:
        for stage, blocks in (("1_1", 1), ("1_2", 1), ("2", 2)):
            x = self.downsample(f"downsample{stage}", x)
            for index in range(blocks):
                at = f"2_{index + 1}" if stage == "2" else stage
                x = self.conv_block(f"ConvBlock{at}.0.", x)
        for stage, blocks in ((3, 6), (4, 2)):
            x = self.downsample(f"downsample{stage}", x, 5 - stage)
            for index in range(blocks):
                x = self.attention_block(f"block{stage}.{index}", x)
        x = self.lif("head", x.mean((2, 3)))
        second = "head_kd" if "head_kd.weight" in self.w else "head"
        return (self.head(x) + self.head(x, second)) / 2


class ESpikeFormerByHand(MetaByHand):
    def lif(self, key: str, x: Tensor, threshold: float = 1.0) -> Tensor:
        return x.clamp(0, 4).round() / (1 if key == "head" else 4)

    def conv_bn(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        if f"{name}.0.weight" in self.w:
            return self.norm(name + ".1", self.conv(name + ".0", x, stride))
        if f"{name}_conv.0.weight" in self.w:
            return self.conv_bn(name + "_conv", x, stride)
        return super().conv_bn(name, x, stride)

    def separable(self, at: str, x: Tensor) -> Tensor:
        for layer in ("pwconv1", "dwconv", "pwconv2"):
            x = self.conv_bn(at + layer, self.lif("", x))
        return x

    def conv_block(self, at: str, x: Tensor) -> Tensor:
        x = x + self.separable(at + "Conv.", x)
        h = self.norm(at + "bn1", self.conv(at + "conv1", self.lif("", x)))
        return x + self.norm(at + "bn2", self.conv(at + "conv2", self.lif("", h)))

    def self_attention(self, at: str, x: Tensor) -> Tensor:
        q, k, v = self.projected(at, x, "qkv")
        scores = torch.einsum("bhdn,bhdm->bhnm", q, k) * 2 / q.shape[2] ** 0.5
        a = self.lif(at, torch.einsum("bhnm,bhdm->bhdn", scores, v))
        return a.reshape(len(x), -1, *x.shape[2:])

    def attention_block(self, name: str, x: Tensor) -> Tensor:
        return super().attention_block(name, x + self.separable(f"{name}.conv.", x))


class Family(NamedTuple):
    from_published: Callable[..., nn.Module]
    by_hand: Callable[[dict[str, Tensor]], StepByStep]


FAMILIES = {
    "spikformer": Family(
        partial(spikformer.from_published, heads=2),
        partial(SpikformerByHand, heads=2),
    ),
    "spike-driven transformer": Family(
        spike_driven_transformer.from_published,
        partial(SpikeDrivenByHand, heads=2),
    ),
    "max-former": Family(max_former.from_published, partial(MaxFormerByHand, heads=1)),
    "ms-qkformer": Family(
        max_former.ms_qkformer_from_published, partial(MSQKFormerByHand, heads=1)
    ),
    "e-spikeformer": Family(
        partial(e_spikeformer.from_published, heads=2), partial(ESpikeFormerByHand, heads=2)
    ),
    "meta-spikeformer": Family(
        partial(meta_spikeformer.from_published, heads=2),
        partial(MetaByHand, heads=2),
    ),
}
each_family = pytest.mark.parametrize("name", TRANSFORMERS)


def small(name: str) -> Any:
    return TRANSFORMERS[name](over="time").double().eval()


@each_family
def test_names_and_shapes_are_the_published_ones(name: str) -> None:
    network = small(name)
    golden = GOLDEN / f"{name.replace(' ', '_').replace('-', '_')}.txt"
    lines = (line.split() for line in golden.read_text().splitlines())
    theirs = {key: tuple(map(int, shape)) for key, *shape in lines}
    needed = {k: v for k, v in theirs.items() if not network.published.is_ignored(k)}
    assert {key: tuple(x.shape) for key, x in to_published(network).items()} == needed
    for pattern in network.published.unused:
        assert any(re.search(pattern, key) for key in theirs)


@each_family
def test_against_an_independent_forward(name: str) -> None:
    network = small(name)
    x_BCHW = 2 * torch.randn(2, 3, 48, 40, dtype=torch.float64)
    by_hand = FAMILIES[name].by_hand(to_published(network))
    with torch.no_grad():
        expected_TBK = torch.stack([by_hand(x_BCHW) for _ in range(3)])
    assert (outputs(network, repeat(x_BCHW, 3)) - expected_TBK).abs().max() < 1e-12
    # Membranes carry over, but for integer neurons.
    assert torch.equal(expected_TBK[0], expected_TBK[2]) == (name == "e-spikeformer")
    assert expected_TBK.std(1).max() > 0
    assert len(by_hand.membranes) == len(named_neurons(network))


@each_family
def test_there_and_back(name: str) -> None:
    """The published network has statistics over time, unless chosen otherwise."""
    network = small(name)
    published = to_published(network) | {"head.num_batches_tracked": torch.tensor(3)}
    for choices, over in (({}, "time"), ({"over": "step"}, "step")):
        again = FAMILIES[name].from_published(published, **choices)
        assert {norm.over for norm in batch_norms(again)} == {over}
        assert again.state_dict().keys() == network.state_dict().keys()
        assert all(map(torch.equal, again.state_dict().values(), network.state_dict().values()))


MODULES = (
    qkformer,
    spikformer,
    spike_driven_transformer,
    meta_spikeformer,
    e_spikeformer,
    max_former,
    sew_resnet,
    ms_resnet,
    nf_resnet,
    preact_resnet,
)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_parameters_of_the_published_sizes(module: Any) -> None:
    with torch.device("meta"):
        networks = [each.build() for each in module.PUBLISHED_SIZES]
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert counts == [each.parameters for each in module.PUBLISHED_SIZES]


def test_the_table_of_published_sizes(done: Done) -> None:
    printed = done("models")
    for module in MODULES:
        for each in module.PUBLISHED_SIZES:
            cells = (each.family, each.size, f"{each.parameters / 1e6:.2f}", each.top1, each.source)
            line = r"\s+".join(re.escape(cell) for cell in cells)
            assert re.search(rf"^{line}$", printed, re.MULTILINE)
    assert "No published file of weights was read." in printed


WEIGHTS = to_published(TRANSFORMERS["spikformer"](over="time"))
test_refuses = refusals(
    [
        (
            lambda: Spikformer(heads=3, **STAGES),
            "Spikformer: channels must be a multiple of 8 and of heads; got channels=32, heads=3",
        ),
        (
            lambda: SpikeDrivenTransformer(**STAGES | {"channels": 12}),
            "SpikeDrivenTransformer: channels must be a multiple of 8; got channels=12",
        ),
        (
            lambda: spikformer.from_published(WEIGHTS | {"pos_embed": torch.zeros(1)}, heads=2),
            "must be those of a published Spikformer; got 1 unknown: pos_embed",
        ),
    ]
)
