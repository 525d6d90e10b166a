"""Spike-driven Transformer (SDT, version 1): a Spikformer on a real-valued stream.

    stem:      3 times synapse, norm, neuron, max pool, then synapse, norm, max pool;
               x <- x + (neuron, 3x3 synapse, norm), which encodes the position
    blocks:    x <- x + attention(x),   x <- x + ffn(x), with ChannelMask (`models/attention.py`)
    head:      mean over tokens, neuron, linear classifier

The shortcuts add currents ("membrane", `models/residual.py`), and every synapse but the first reads
spikes. No product of the attention has a factor that is not a spike.

In float64 the network equals model/ and module/ of github.com/BICLab/Spike-Driven-Transformer,
commit 3faa82272eb4 (docs/LOG.md). The published `talking_heads` have no effect there, and drop path
is declared but never applied. The number of heads has no effect either.

Source: Yao et al. 2023 (Spike-driven Transformer, arXiv 2307.01694).
"""

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts, require
from pipeline.models.attention import NEURON, ChannelMask, SpikingTransformer, block
from pipeline.models.parts import StatisticsOver
from pipeline.models.published import PublishedNames, PublishedSize, load_published
from pipeline.models.residual import BlockFactory, named_sequential
from pipeline.models.spikformer import NAMES, published_sizes, stem

# T time, B batch, C channels, H W pixels


class SpikeDrivenTransformer(SpikingTransformer):
    """`[T, B, C, H, W]` to `[T, B, K]`, for images of any size.

    Args:
        channels: D, a multiple of 8.
        depth: the number of blocks.
        expansion: the factor by which the FFN widens the channels.
        over: statistics of batch norm in training. "time" is as published; rules that run in slices
            need "step".

    Raises: ValueError for sizes below 1, or channels that are not a multiple of 8.
    """

    published = PublishedNames(
        NAMES,
        unused={r"\.attn\.talking_heads\.": "a convolution that is made but never called"},
    )

    def __init__(
        self,
        *,
        channels: int,
        depth: int,
        classes: int,
        in_channels: int = 3,
        expansion: int = 4,
        over: StatisticsOver = "time",
        neuron: nn.Module = NEURON,
    ) -> None:
        refuse_unless_counts(
            "SpikeDrivenTransformer",
            {
                "channels": channels,
                "depth": depth,
                "classes": classes,
                "in_channels": in_channels,
                "expansion": expansion,
            },
        )
        require(
            channels % 8 == 0,
            f"SpikeDrivenTransformer: channels must be a multiple of 8; got {channels=}",
        )
        blocks = BlockFactory(shortcut="membrane", neuron=neuron, over=over)
        attention = partial(ChannelMask, blocks, channels)
        features = named_sequential(
            stem=stem(blocks, in_channels, channels),
            blocks=nn.Sequential(
                *(block(blocks, channels, attention, expansion=expansion) for _ in range(depth))
            ),
        )
        super().__init__(features, channels=channels, classes=classes, last=blocks.stream_neuron())


def from_published(
    published: Mapping[str, Tensor], *, over: StatisticsOver = "time"
) -> SpikeDrivenTransformer:
    """A SpikeDrivenTransformer with published weights. Its sizes are those of the tensors.

    Raises: ValueError for missing or unknown tensors, or tensors of another shape.
    """
    return load_published(
        published, lambda: SpikeDrivenTransformer(**published_sizes(published), over=over)
    )


PUBLISHED_SIZES = tuple(
    PublishedSize(
        "Spike-driven Transformer",
        f"{depth}-{channels}",
        parameters,
        f"{top1}, T=4, unknown pixels",
        "2307.01694",
        partial(SpikeDrivenTransformer, channels=channels, depth=depth, classes=1000),
    )
    for depth, channels, parameters, top1 in (
        (8, 384, 16_816_024, 72.28),
        (6, 512, 23_373_352, 74.11),
        (8, 512, 29_689_384, 74.57),
        (10, 512, 36_005_416, 74.66),
        (8, 768, 66_338_632, 77.07),
    )
)
