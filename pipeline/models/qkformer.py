"""QKFormer: a spiking Transformer with three stages, at 1/4, 1/8 and 1/16 of the image, rounded up.

    stage 1:   stem, embed to D/4, 1 block with TokenQK
    stage 2:   embed to D/2, 2 blocks with TokenQK
    stage 3:   embed to D, all other blocks with SelfAttention
    head:      mean over tokens, linear classifier
    block:     x <- x + attention(x),   x <- x + ffn(x),   ffn of two 1x1 synapses, D to 4 D to D
    stem:      synapse to D/8, norm, max pool, neuron
    embed:     (synapse, norm, max pool, neuron, synapse, norm, neuron)
               + (1x1 synapse of stride 2, norm, neuron)

This is the published form, `shortcut="sew"`, whose stream consists of whole numbers. With
"membrane", "multiple" and "multiple_all" the stream is real-valued (`models/residual.py`). A neuron
then precedes each synapse but the first, also in the embeddings and before the classifier. A block
starts as the identity, as in MS-ResNet (except under "multiple_all", where its attention adds a).

`models/attention.py` describes both attentions.

With `projection_neuron="over_samples"` the neuron after SelfAttention's S runs as in the published
code (see `OverSamples`). Published accuracies were measured with this neuron.

The drop-path share grows linearly with depth to `drop_path`. Both branches of a block have the same
share. The published code declares drop path but never applies it, so 0 is as published.

Source: Zhou et al. 2024 (QKFormer, arXiv 2403.16552), also for the names and shapes of the weights.
"""

import re
from collections.abc import Mapping
from functools import partial
from itertools import islice
from typing import Literal

from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts, refuse_unless_one_of, require
from pipeline.models.attention import (
    BLOCK_NAMES,
    NEURON,
    ProjectionNeuron,
    SelfAttention,
    TokenQK,
    block,
)
from pipeline.models.parts import Pool, StatisticsOver
from pipeline.models.published import (
    PublishedNames,
    PublishedSize,
    count_blocks,
    load_published,
    sizes,
)
from pipeline.models.residual import BlockFactory, Layer, Norm, Shortcut, named_sequential
from pipeline.spiking.neuron import LIF
from pipeline.spiking.slice_cache import StaticInput
from pipeline.spiking.surrogate import Sigmoid
from pipeline.spiking.synapse import Linear

# T time, B batch, C channels, H W pixels, K classes

# Normaliser-free networks have no input scaling, because it would shrink their currents.
SWS_NEURON = LIF(0.5, surrogate=Sigmoid(4.0))


def _stage_name(match: re.Match[str]) -> str:
    stage, index = int(match[1]) + 1, int(match[2])
    return f"stage{stage}.{index - 1}." if index else f"patch_embed{stage}."


# Names of the stages but for the synapses of the first embedding.
STAGE_NAMES = (
    (r"^stages\.0\.0\.stem\.0\.", "patch_embed1.proj."),
    (r"^stages\.(\d)\.(\d+)\.(?:residual\.)?", _stage_name),
    (r"^(patch_embed\d)\.branch\.0\.", r"\1.proj3."),
    (r"^(patch_embed\d)\.branch\.2\.", r"\1.proj4."),
    (r"^(patch_embed\d)\.shortcut\.0\.", r"\1.proj_res."),
    *BLOCK_NAMES,
)
NAMES = PublishedNames(
    (
        (r"^stages\.0\.0\.residual\.branch\.0\.", "patch_embed1.proj1."),
        (r"^stages\.0\.0\.residual\.branch\.2\.", "patch_embed1.proj2."),
        *STAGE_NAMES,
        (r"^(stage[12]\..*)\.attn\.", r"\1.tssa."),
    ),
    flat=r"\.(attn|tssa)\.\w+_conv\.weight$",
)


class QKFormer(nn.Module):
    """`[T, B, C, H, W]` to `[T, B, K]`, for images of any size.

    After shrinking, each square of 16 by 16 pixels gives one token in the last stage.

    Args:
        channels: D, the channels of the last stage; a multiple of 4 * `heads`.
        depth: the total number of blocks. The first stage has 1 of them, the second has 2.
        heads: heads of every attention.
        expansion: the factor by which the FFN widens the channels.
        drop_path: the share at the last block.
        shrink: images are first averaged over squares of this many pixels a side, so that a small
            student sees less detail than its teacher. Remaining rows and columns at the right and
            the bottom are ignored.
        projection_neuron: the neuron after S in the last stage. "over_samples" is as in the
            published code and necessary for published accuracies. An output then depends on its
            batch.
        neuron: None: the published LIF (decay 0.5, scaled input, reset to zero), or under "sws" a
            LIF with reset by subtraction and without scaled input.

    Raises: ValueError for sizes below 1, channels that are not a multiple of 4 * `heads`, a depth
    below 4, or choices that do not fit together; in `forward` for a side below `shrink` pixels.
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
        over: StatisticsOver = "step",
        drop_path: float = 0.0,
        shrink: int = 1,
        projection_neuron: ProjectionNeuron = "over_time",
        neuron: nn.Module | None = None,
    ) -> None:
        super().__init__()
        _check(
            classes=classes,
            in_channels=in_channels,
            expansion=expansion,
            heads=heads,
            channels=channels,
            shrink=shrink,
            depth=depth,
            shortcut=shortcut,
        )
        if neuron is None:
            neuron = SWS_NEURON if norm == "sws" else NEURON
        self.shrink = shrink
        self.published = NAMES if shortcut == "sew" else None
        blocks = BlockFactory(shortcut=shortcut, neuron=neuron, norm=norm, over=over)
        shares = iter(drop_path * index / (depth - 1) for index in range(depth))
        self.stages = nn.Sequential()
        for width, count, attention in (
            (channels // 4, 1, TokenQK),
            (channels // 2, 2, TokenQK),
            (channels, depth - 3, partial(SelfAttention, projection_neuron=projection_neuron)),
        ):
            stem = nn.Sequential()
            if not self.stages:
                stem = _stem(blocks, in_channels, width // 2, shrink=shrink)
            layers = [Layer(width // 2, width, 3, pools=True), Layer(width, width, 3)]
            residual = blocks.one_residual(layers, shortcut_of="first")
            stage = nn.Sequential(named_sequential(stem=stem, residual=residual))
            build_attention = partial(attention, blocks, width, heads=heads)
            for share in islice(shares, count):
                stage.append(
                    block(blocks, width, build_attention, expansion=expansion, drop_path=share)
                )
            self.stages.append(stage)
        self.last = nn.Identity() if blocks.carries_spikes else blocks.stream_neuron()
        self.classifier = Linear(channels, classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        if min(x_TBCHW.shape[3:]) < self.shrink:
            raise ValueError(
                f"QKFormer: an image must have at least shrink={self.shrink} pixels a side; got"
                f" {tuple(x_TBCHW.shape[3:])}"
            )
        return self.classifier(self.last(self.stages(x_TBCHW)).mean((3, 4)))


def _check(*, depth: int, shortcut: Shortcut, channels: int, heads: int, **counts: int) -> None:
    refuse_unless_counts("QKFormer", counts | {"heads": heads, "channels": channels})
    require(
        channels % (4 * heads) == 0,
        f"QKFormer: channels must be a multiple of 4 * heads; got {channels=}, {heads=}",
    )
    require(
        depth >= 4,
        "QKFormer: depth must be >= 4, one block for the first stage and two for the second; got"
        f" {depth=}",
    )
    require(
        shortcut != "post_activation",
        "QKFormer: shortcut must not be 'post_activation', which has no published form for"
        " attention",
    )


def _stem(blocks: BlockFactory, in_channels: int, channels: int, *, shrink: int) -> nn.Sequential:
    layers = dict(
        blocks.normed_synapse(Layer(in_channels, channels, 3, pools=True)).named_children()
    )
    if shrink > 1:
        layers = {"shrink": Pool(nn.AvgPool2d(shrink)), **layers}
    first = StaticInput.of(named_sequential(**layers))
    return nn.Sequential(first, blocks.neuron()) if blocks.carries_spikes else nn.Sequential(first)


def qkformer_10(
    channels: Literal[384, 512, 768] = 384,
    *,
    classes: int = 1000,
    in_channels: int = 3,
    shortcut: Shortcut = "sew",
    norm: Norm = "batch",
    over: StatisticsOver = "step",
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


def from_published(
    published: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    over: StatisticsOver = "time",
    projection_neuron: ProjectionNeuron = "over_time",
) -> QKFormer:
    """A QKFormer with published weights. Its sizes are those of the tensors.

    Args:
        published: tensors under their published names.
        heads: heads of every attention. No tensor shows the number. None: one per 64 channels, as
            published for ImageNet.
        over: statistics of batch norm in training (`models/residual.py`). "time" is the published
            network. Rules that run in slices need "step", which changes the network.
        projection_neuron: "over_samples" is as in the published code; outputs then depend on the
            batch.

    Raises: ValueError for missing or unknown tensors, tensors of another shape, or no `heads` for
    fewer than 64 channels.
    """
    classes, channels = sizes(published, "head.weight", 2)
    require(
        heads is not None or channels >= 64,
        f"from_published: heads must be set for fewer than 64 channels; got {channels} channels",
    )
    return load_published(
        published,
        lambda: QKFormer(
            channels=channels,
            depth=count_blocks(published, r"(.*)\.mlp\."),
            heads=channels // 64 if heads is None else heads,
            classes=classes,
            in_channels=sizes(published, "patch_embed1.proj_conv.weight", 4)[1],
            expansion=sizes(published, "stage1.0.mlp.fc1_conv.weight", 4)[0] * 4 // channels,
            over=over,
            projection_neuron=projection_neuron,
        ),
    )


PUBLISHED_SIZES = tuple(
    PublishedSize("QKFormer", size, parameters, f"{top1}, T=4, over_samples", "2403.16552", build)
    for build, size, parameters, top1 in (
        (partial(qkformer_10, 384), "10-384", 16_473_688, "78.80"),
        (partial(qkformer_10, 512), "10-512", 29_079_336, "82.04"),
        (partial(qkformer_10, 768), "10-768", 64_962_760, "84.22"),
    )
)
