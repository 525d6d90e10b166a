"""Max-Former: depthwise convolutions before attention, and MS-QKFormer, beside which it was shown.

    Max-Former, each stage at half the size of the one before, from 1/4 on, rounded up
    stage 1:   synapse of stride 2, norm; embed to D/4, whose first synapse has stride 2;
               1 block with a depthwise 7x7 synapse
    stage 2:   embed to D/2, with a max pool; 2 blocks with a depthwise 5x5 synapse
    stage 3:   embed to D, with a max pool; 7 blocks with SelfAttention
    head:      mean over tokens, neuron, linear classifier
    block:     x <- x + mixer(x),   x <- x + ffn(x),   mixer: neuron, depthwise synapse, norm
    embed:     h = neuron(x);   (3x3 synapse, norm, pool, neuron, 3x3 synapse, norm)(h)
               + (1x1 synapse, norm, pool)(h)

The shortcuts add currents ("membrane", `models/residual.py`). MS-QKFormer is the QKFormer with such
shortcuts. Unlike in `QKFormer(shortcut="membrane")`, the last neuron reads the mean over tokens.
Every neuron has one membrane per sample, which QKFormer's published code lacks (`OverSamples`).

In float64 both networks equal imagenet/ of github.com/bic-L/MaxFormer, commit 6ddd4ccde2cc
(docs/LOG.md).

Source: Fang et al. 2025 (Max-Former, arXiv 2505.18608).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts, require
from pipeline.models.attention import (
    BLOCK_NAMES,
    NEURON,
    SelfAttention,
    SpikingTransformer,
    block,
)
from pipeline.models.parts import StatisticsOver
from pipeline.models.published import (
    PublishedNames,
    PublishedSize,
    count_blocks,
    load_published,
    sizes,
)
from pipeline.models.qkformer import STAGE_NAMES, QKFormer
from pipeline.models.residual import BlockFactory, Layer, Residual, named_sequential
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.slice_cache import StaticInput
from pipeline.spiking.synapse import Conv2d

# T time, B batch, C channels, H W pixels, K classes

FLAT = r"\.attn\.\w+_conv\.weight$"


class MaxFormer(SpikingTransformer):
    """`[T, B, C, H, W]` to `[T, B, K]`, for images of any size.

    Args:
        channels: D, a multiple of 8 and of `heads`.
        heads: heads of every attention.
        expansion: the factor by which the FFN widens the channels.
        over: statistics of batch norm in training. "time" is as published; rules that run in slices
            need "step".

    Raises: ValueError for sizes below 1, or channels that are not a multiple of 8 and `heads`.
    """

    published = PublishedNames(
        (
            (r"^features\.0\.embed\.0\.", "patch_embed1.embed1.embed."),
            (r"^features\.0\.embed\.1\.branch\.0\.", "patch_embed1.embed2.embed."),
            (r"^features\.0\.embed\.1\.branch\.2\.", "patch_embed1.embed3.embed."),
            (r"^features\.0\.embed\.1\.shortcut\.0\.", "patch_embed1.embed4.embed."),
            (r"^features\.1\.embed\.", "patch_embed2."),
            (r"^features\.2\.embed\.", "patch_embed3."),
            (r"^(patch_embed[23])\.branch\.0\.", r"\1.max_embed1.embed."),
            (r"^(patch_embed[23])\.branch\.2\.", r"\1.embed1.embed."),
            (r"^(patch_embed[23])\.shortcut\.", r"\1.max_embed2.embed."),
            (r"^features\.0\.blocks\.(\d)\.attention\.branch\.", r"stage1.\1.mixer.conv5."),
            (r"^features\.1\.blocks\.(\d)\.attention\.branch\.", r"stage2.\1.mixer.conv."),
            (r"\.(conv5?)\.synapse\.", r".\1."),
            (r"^features\.0\.blocks\.", "stage1."),
            (r"^features\.1\.blocks\.", "stage2."),
            (r"^features\.2\.blocks\.", "stage3."),
            *BLOCK_NAMES,
        ),
        flat=FLAT,
    )

    def __init__(
        self,
        *,
        channels: int,
        heads: int,
        classes: int,
        in_channels: int = 3,
        expansion: int = 4,
        over: StatisticsOver = "time",
        neuron: nn.Module = NEURON,
    ) -> None:
        refuse_unless_counts(
            "MaxFormer",
            {
                "channels": channels,
                "heads": heads,
                "classes": classes,
                "in_channels": in_channels,
                "expansion": expansion,
            },
        )
        require(
            channels % 8 == 0 and channels % heads == 0,
            f"MaxFormer: channels must be a multiple of 8 and of heads; got {channels=}, {heads=}",
        )
        blocks = BlockFactory(shortcut="membrane", neuron=neuron, over=over)
        first, second = channels // 4, channels // 2
        embeddings = (
            first_embedding(blocks, in_channels, first),
            embedding(blocks, first, second),
            embedding(blocks, second, channels),
        )
        mixers = (
            partial(mixer, blocks, first, 7),
            partial(mixer, blocks, second, 5),
            partial(SelfAttention, blocks, channels, heads=heads),
        )
        features = nn.Sequential()
        for embed, mix, width, depth in zip(
            embeddings, mixers, (first, second, channels), (1, 2, 7), strict=True
        ):
            made = (block(blocks, width, mix, expansion=expansion) for _ in range(depth))
            features.append(named_sequential(embed=embed, blocks=nn.Sequential(*made)))
        super().__init__(features, channels=channels, classes=classes, last=blocks.stream_neuron())


def first_embedding(blocks: BlockFactory, in_channels: int, channels: int) -> nn.Sequential:
    """A quarter of the size, by strides."""
    stem = blocks.normed_synapse(Layer(in_channels, channels // 2, 3, 2))
    convolutions = [Layer(channels // 2, channels, 3, 2), Layer(channels, channels, 3)]
    return nn.Sequential(
        StaticInput.of(stem), blocks.one_residual(convolutions, shortcut_of="first")
    )


def embedding(blocks: BlockFactory, before: int, channels: int) -> Residual:
    """Half the size. Branch and shortcut end in a max pool, the branch before its last neuron."""
    return Residual(
        nn.Sequential(
            blocks.normed_synapse(Layer(before, channels, 3, pools=True)),
            blocks.branch_neuron(),
            blocks.normed_synapse(Layer(channels, channels, 3)),
        ),
        blocks.normed_synapse(Layer(before, channels, pools=True)),
        first=blocks.stream_neuron(),
        shortcut_of="first",
    )


def mixer(blocks: BlockFactory, channels: int, kernel_size: int) -> nn.Sequential:
    """neuron, depthwise synapse, norm of gain 0."""
    norm = BatchNorm(channels, over=blocks.over)
    nn.init.zeros_(norm.weight)
    return named_sequential(
        neuron=blocks.stream_neuron(),
        synapse=Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels),
        norm=norm,
    )


class MSQKFormer(QKFormer):
    """`[T, B, C, H, W]` to `[T, B, K]`: a QKFormer with membrane shortcuts, as published.

    The arguments are those of `QKFormer`. The published heads have 16 channels in the first stage,
    32 in the second and 64 in the last: `heads` is channels // 64.
    """

    def __init__(
        self,
        *,
        channels: int,
        heads: int,
        classes: int,
        depth: int = 10,
        in_channels: int = 3,
        expansion: int = 4,
        over: StatisticsOver = "time",
        neuron: nn.Module = NEURON,
    ) -> None:
        super().__init__(
            channels=channels,
            depth=depth,
            heads=heads,
            classes=classes,
            in_channels=in_channels,
            expansion=expansion,
            shortcut="membrane",
            over=over,
            neuron=neuron,
        )
        self.published = PublishedNames(
            (
                (r"^stages\.0\.0\.residual\.branch\.0\.synapse\.", "patch_embed1.proj_conv1."),
                (r"^stages\.0\.0\.residual\.branch\.0\.norm\.", "patch_embed1.proj_bn1."),
                (r"^stages\.0\.0\.residual\.branch\.2\.synapse\.", "patch_embed1.proj_conv2."),
                (r"^stages\.0\.0\.residual\.branch\.2\.norm\.", "patch_embed1.proj_bn2."),
                (r"^stages\.0\.0\.residual\.shortcut\.0\.", "patch_embed1.rpe."),
                *STAGE_NAMES,
            ),
            flat=FLAT,
        )

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return self.classifier(self.last(self.stages(x_TBCHW).mean((3, 4))))


def from_published(
    published: Mapping[str, Tensor], *, heads: int | None = None, over: StatisticsOver = "time"
) -> MaxFormer:
    """A MaxFormer with published weights. Its sizes are those of the tensors.

    `heads` is not visible in the tensors. None: one per 64 channels, as published.

    Raises: ValueError for missing or unknown tensors, or tensors of another shape.
    """
    channels = sizes(published, "head.weight", 2)[1]
    return load_published(
        published,
        lambda: MaxFormer(
            channels=channels,
            heads=channels // 64 if heads is None else heads,
            **_sizes(published, "patch_embed1.embed1.embed_conv.weight"),
            over=over,
        ),
    )


def ms_qkformer_from_published(
    published: Mapping[str, Tensor], *, heads: int | None = None, over: StatisticsOver = "time"
) -> MSQKFormer:
    """As `from_published`, for an MSQKFormer."""
    channels = sizes(published, "head.weight", 2)[1]
    return load_published(
        published,
        lambda: MSQKFormer(
            channels=channels,
            heads=channels // 64 if heads is None else heads,
            depth=count_blocks(published, r"(.*)\.mlp\."),
            **_sizes(published, "patch_embed1.proj_conv.weight"),
            over=over,
        ),
    )


def _sizes(published: Mapping[str, Tensor], stem: str) -> dict[str, Any]:
    hidden, channels = sizes(published, "stage1.0.mlp.fc1_conv.weight", 4)[:2]
    return {
        "classes": sizes(published, "head.weight", 2)[0],
        "in_channels": sizes(published, stem, 4)[1],
        "expansion": hidden // channels,
    }


# Top-1 is that of the best epoch in the published logs.
PUBLISHED_SIZES = tuple(
    PublishedSize(
        family,
        f"10-{channels}",
        parameters,
        top1,
        "2505.18608",
        partial(network, channels=channels, heads=channels // 64, classes=1000),
    )
    for family, network, channels, parameters, top1 in (
        ("Max-Former", MaxFormer, 384, 16_237_240, "77.78, T=4"),
        ("Max-Former", MaxFormer, 512, 28_653_480, "75.43, T=1"),
        ("Max-Former", MaxFormer, 768, 63_992_200, "82.39, T=4"),
        ("MS-QKFormer", MSQKFormer, 384, 16_473_688, "-"),
        ("MS-QKFormer", MSQKFormer, 512, 29_079_336, "-"),
        ("MS-QKFormer", MSQKFormer, 768, 64_962_760, "-"),
    )
)
