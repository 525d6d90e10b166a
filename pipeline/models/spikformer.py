"""Spikformer: a spiking Transformer of one stage, at 1/16 of the image, rounded up.

    stem:      4 times synapse, norm, neuron, max pool, to D/8, D/4, D/2 and D;
               x <- x + (3x3 synapse, norm, neuron), which encodes the position
    blocks:    x <- x + attention(x),   x <- x + ffn(x), with SelfAttention (`models/attention.py`)
    head:      mean over tokens, linear classifier

The shortcuts add spikes ("sew", `models/residual.py`), so the stream consists of whole numbers.

In float64 the network equals imagenet/model.py of github.com/ZK-Zhou/spikformer, commit
621268981827 (docs/LOG.md). The published parameters of `norm1` and `norm2` have no effect there,
and drop path is declared but never applied.

Source: Zhou et al. 2023 (Spikformer, arXiv 2209.15425).
"""

import re
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
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
from pipeline.models.parts import Pool, StatisticsOver
from pipeline.models.published import (
    PublishedNames,
    PublishedSize,
    count_blocks,
    load_published,
    sizes,
)
from pipeline.models.residual import BlockFactory, Layer, named_sequential
from pipeline.spiking.slice_cache import StaticInput

# T time, B batch, C channels, H W pixels


def _stem_name(match: re.Match[str]) -> str:
    kind = "conv" if match[2] == "synapse" else "bn"
    return f"patch_embed.proj_{kind}{match[1] if match[1] != '0' else ''}."


NAMES = (
    (r"^features\.stem\.layer(\d)\.(synapse|norm)\.", _stem_name),
    (r"^features\.stem\.position\.branch\.0\.", "patch_embed.rpe."),
    (r"^features\.blocks\.", "block."),
    *BLOCK_NAMES,
)


class Spikformer(SpikingTransformer):
    """`[T, B, C, H, W]` to `[T, B, K]`, for images of any size.

    Args:
        channels: D, a multiple of 8 and of `heads`.
        depth: the number of blocks.
        heads: heads of every attention.
        expansion: the factor by which the FFN widens the channels.
        over: statistics of batch norm in training. "time" is as published; rules that run in slices
            need "step".

    Raises: ValueError for sizes below 1, or channels that are not a multiple of 8 and `heads`.
    """

    published = PublishedNames(
        NAMES,
        flat=r"\.attn\.\w+_conv\.weight$",
        unused={r"^block\.\d+\.norm[12]\.": "a LayerNorm that is made but never called"},
    )

    def __init__(
        self,
        *,
        channels: int,
        depth: int,
        heads: int,
        classes: int,
        in_channels: int = 3,
        expansion: int = 4,
        over: StatisticsOver = "time",
        neuron: nn.Module = NEURON,
    ) -> None:
        refuse_unless_counts(
            "Spikformer",
            {
                "channels": channels,
                "depth": depth,
                "heads": heads,
                "classes": classes,
                "in_channels": in_channels,
                "expansion": expansion,
            },
        )
        require(
            channels % 8 == 0 and channels % heads == 0,
            f"Spikformer: channels must be a multiple of 8 and of heads; got {channels=}, {heads=}",
        )
        blocks = BlockFactory(shortcut="sew", neuron=neuron, over=over)
        attention = partial(SelfAttention, blocks, channels, heads=heads)
        features = named_sequential(
            stem=stem(blocks, in_channels, channels),
            blocks=nn.Sequential(
                *(block(blocks, channels, attention, expansion=expansion) for _ in range(depth))
            ),
        )
        super().__init__(features, channels=channels, classes=classes)


def stem(blocks: BlockFactory, in_channels: int, channels: int) -> nn.Sequential:
    """Patches of 16 by 16 pixels as tokens with `channels` channels.

    On a real-valued stream the last layer has no neuron, and one precedes the position's synapse.
    """
    parts: dict[str, nn.Module] = {}
    widths = pairwise((in_channels, channels // 8, channels // 4, channels // 2, channels))
    for index, (before, after) in enumerate(widths):
        is_stream = index == 3 and not blocks.carries_spikes
        layer = blocks.normed_synapse(Layer(before, after, 3, pools=is_stream))
        parts[f"layer{index}"] = layer if index else StaticInput.of(layer)
        if not is_stream:
            parts[f"neuron{index}"] = blocks.neuron()
            parts[f"pool{index}"] = Pool(nn.MaxPool2d(3, stride=2, padding=1))
    parts["position"] = blocks.one_residual([Layer(channels, channels, 3)])
    return named_sequential(**parts)


def from_published(
    published: Mapping[str, Tensor], *, heads: int = 8, over: StatisticsOver = "time"
) -> Spikformer:
    """A Spikformer with published weights. Its sizes are those of the tensors.

    `heads` is not visible in the tensors; it is 8 in the published code.

    Raises: ValueError for missing or unknown tensors, or tensors of another shape.
    """
    return load_published(
        published, lambda: Spikformer(**published_sizes(published), heads=heads, over=over)
    )


def published_sizes(published: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of a Spikformer, or of a SpikeDrivenTransformer, with `published` weights."""
    classes, channels = sizes(published, "head.weight", 2)
    return {
        "channels": channels,
        "depth": count_blocks(published, r"block\.(\d+)\."),
        "classes": classes,
        "in_channels": sizes(published, "patch_embed.proj_conv.weight", 4)[1],
        "expansion": sizes(published, "block.0.mlp.fc1_conv.weight", 4)[0] // channels,
    }


# Top-1 as in the readme of github.com/zhouchenlin2096/Spikingformer.
PUBLISHED_SIZES = tuple(
    PublishedSize(
        "Spikformer",
        f"8-{channels}",
        parameters,
        f"{top1}, T=4",
        "2209.15425",
        partial(Spikformer, channels=channels, depth=8, heads=8, classes=1000),
    )
    for channels, parameters, top1 in (
        (384, 16_816_024, 70.24),
        (512, 29_689_384, 73.38),
        (768, 66_338_632, 74.81),
    )
)
