"""QKFormer: a spiking Transformer with three stages, at 1/4, 1/8 and 1/16 of the image, rounded up.

    stage 1:   embed to D/4, 1 block with TokenQK
    stage 2:   embed to D/2, 2 blocks with TokenQK
    stage 3:   embed to D, all other blocks with SelfAttention
    head:      mean over tokens, linear classifier
    block:     x <- x + attention(x),   x <- x + ffn(x),   ffn of two 1x1 synapses, D to 4 D to D
    embed:     (synapse, norm, max pool, neuron, synapse, norm, neuron)
               + (1x1 synapse of stride 2, norm, neuron)

This is the published form, `shortcut="sew"`, whose stream holds whole numbers. With "membrane",
"multiple" and "multiple_all" the stream is real-valued (`models/residual.py`). Then neurons stand
before synapses, also in the embeddings, and one before the classifier. A block starts as the
identity, as in MS-ResNet (except under "multiple_all", where a of its attention is added).

The drop-path share grows linearly with depth to `drop_path`, with one share for both branches of a
block. The published code declares drop path but never applies it, so 0 is as published.

Source: Zhou et al. 2024 (QKFormer, arXiv 2403.16552).
"""

# T time, B batch, C channels, H W pixels, K classes

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts, refuse_unless_one_of
from pipeline.models.attention import Attention, ProjectionNeuron, SelfAttention, TokenQK
from pipeline.models.parts import Over, Pool
from pipeline.models.residual import BlockFactory, Layer, Norm, Shortcut, named
from pipeline.spiking.neuron import LIF
from pipeline.spiking.static_input import StaticInput
from pipeline.spiking.surrogate import Sigmoid
from pipeline.spiking.synapse import Linear

# SpikingJelly's LIF at tau 2, as in the published code; for normaliser-free networks without input
# scaling, which would shrink their currents.
NEURON = LIF(0.5, reset="zero", scale_input=True, surrogate=Sigmoid(4.0))
SWS_NEURON = LIF(0.5, surrogate=Sigmoid(4.0))


class QKFormer(nn.Module):
    """`[T, B, C, H, W]` to `[T, B, K]`, for images of any size; 16 pixels a side after shrinking
    leave one token in the last stage.

    Args:
        channels: D, of the last stage; a multiple of 4 heads.
        depth: number of blocks in all; 1 and 2 of them are in the first stages.
        heads: of every attention.
        expansion: of the FFN.
        drop_path: the share at the last block.
        shrink: images are first averaged over squares of this many pixels a side, so that a small
            student sees less detail than its teacher. Rows and columns that fill no square, at the
            right and the bottom, are left out.
        projection_neuron: of the last stage's attentions (`models/attention.py`). "over_samples" is
            the published code's, which published accuracies need; an output then depends on its
            batch.
        neuron: None for the published LIF (decay 0.5, scaled input, reset to zero); under "sws" for
            a LIF with reset by subtraction and without scaled input.

    Raises: ValueError for sizes below 1, or choices that do not fit together
    (`models/residual.py`); in `forward` for images smaller than one square.
    """

    def __init__(
        self,
        *,
        channels: int,
        depth: int,
        heads: int,
        classes: int,
        in_channels: int = 3,
        expansion: int = 4,
        shortcut: Shortcut = "sew",
        norm: Norm = "batch",
        over: Over = "step",
        drop_path: float = 0.0,
        shrink: int = 1,
        projection_neuron: ProjectionNeuron = "over_time",
        neuron: nn.Module | None = None,
    ) -> None:
        super().__init__()
        numbers = {
            "classes": classes,
            "in_channels": in_channels,
            "expansion": expansion,
            "heads": heads,
            "channels": channels,
            "shrink": shrink,
        }
        refuse_unless_counts("QKFormer", numbers)
        self.shrink = shrink
        _check_sizes(channels, heads, depth)
        if shortcut == "post_activation":
            raise ValueError(
                "QKFormer: shortcut must not be 'post_activation', which has no published form for"
                " attention"
            )
        if neuron is None:
            neuron = SWS_NEURON if norm == "sws" else NEURON
        blocks = BlockFactory(shortcut=shortcut, neuron=neuron, norm=norm, over=over)
        shares = iter(drop_path * index / (depth - 1) for index in range(depth))
        self.stages = nn.Sequential()
        for wide, count, attention in (
            (channels // 4, 1, TokenQK),
            (channels // 2, 2, TokenQK),
            (channels, depth - 3, partial(SelfAttention, projection_neuron=projection_neuron)),
        ):
            stem = None if self.stages else _stem(blocks, in_channels, wide // 2, shrink=shrink)
            stage = nn.Sequential(Embed(blocks, wide // 2, wide, stem=stem))
            build = partial(Block, attention=attention, heads=heads, expansion=expansion)
            stage.extend(build(blocks, wide, drop_path=next(shares)) for _ in range(count))
            self.stages.append(stage)
        self.last = nn.Identity() if blocks.carries_spikes else blocks.stream_spikes()
        self.classifier = Linear(channels, classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        height, width = x_TBCHW.shape[3:]
        if min(height, width) < self.shrink:
            raise ValueError(
                f"QKFormer: images must have shrink={self.shrink} pixels a side or more; got"
                f" {height} x {width}"
            )
        return self.classifier(self.last(self.stages(x_TBCHW)).mean((3, 4)))


def _check_sizes(channels: int, heads: int, depth: int) -> None:
    if channels % (4 * heads):
        raise ValueError(
            f"QKFormer: channels must be a multiple of 4 heads; got channels={channels},"
            f" heads={heads}"
        )
    if depth < 4:
        raise ValueError(
            "QKFormer: depth must be >= 4, one block for the first stage and two for the"
            f" second; got {depth=}"
        )


class Embed(nn.Module):
    """Halves the image and changes the channels; the first one has a stem and quarters the
    image.
    """

    def __init__(
        self, blocks: BlockFactory, in_channels: int, channels: int, *, stem: nn.Sequential | None
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential() if stem is None else stem
        layers = [Layer(in_channels, channels, 3, pools=True), Layer(channels, channels, 3)]
        self.residual = blocks.one_residual(layers, shortcut_of="first")

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return self.residual(self.stem(x_TBCHW))


def _stem(blocks: BlockFactory, in_channels: int, channels: int, *, shrink: int) -> nn.Sequential:
    layers = dict(blocks.currents(Layer(in_channels, channels, 3, pools=True)).named_children())
    if shrink > 1:
        layers = {"shrink": Pool(nn.AvgPool2d(shrink)), **layers}
    first = StaticInput.of(named(**layers))
    return nn.Sequential(first, blocks.neuron()) if blocks.carries_spikes else nn.Sequential(first)


class Block(nn.Module):
    """Attention and FFN, each with its shortcut."""

    def __init__(
        self,
        blocks: BlockFactory,
        channels: int,
        *,
        attention: Callable[..., Attention],
        heads: int,
        expansion: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.attention = blocks.wrap(attention(blocks, channels, heads=heads), drop_path=drop_path)
        wide = channels * expansion
        layers = [Layer(channels, wide, bias=True), Layer(wide, channels, bias=True)]
        self.ffn = blocks.residual(layers, last_gain=blocks.branch_gain, drop_path=drop_path)
        self.ffn.part = "ffn"  # type: ignore[assignment]  # read by models/transforms.py

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return self.ffn(self.attention(x_TBCHW))


def qkformer_10(
    channels: Literal[384, 512, 768] = 384,
    *,
    classes: int = 1000,
    in_channels: int = 3,
    shortcut: Shortcut = "sew",
    norm: Norm = "batch",
    over: Over = "step",
    drop_path: float = 0.0,
    projection_neuron: ProjectionNeuron = "over_time",
    neuron: nn.Module | None = None,
) -> QKFormer:
    """QKFormer-10-384, -512 or -768: 16.47, 29.08 or 64.96 M parameters at 1000 classes."""
    refuse_unless_one_of("qkformer_10", (384, 512, 768), channels=channels)
    return QKFormer(
        channels=channels,
        depth=10,
        heads=channels // 64,
        classes=classes,
        in_channels=in_channels,
        shortcut=shortcut,
        norm=norm,
        over=over,
        drop_path=drop_path,
        projection_neuron=projection_neuron,
        neuron=neuron,
    )
