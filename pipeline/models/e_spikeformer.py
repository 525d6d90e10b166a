"""E-SpikeFormer (Spike-driven Transformer, version 3), base sizes: Meta-SpikeFormer on integers.

The stages are those of Meta-SpikeFormer (`models/meta_spikeformer.py`). These parts differ:

    neuron          IntegerNeuron of 4 levels (`spiking/integer.py`); before the classifier it is
                    not divided by 4
    separable       neuron, 1x1 to 2 C, norm, neuron, depthwise, norm, neuron, 1x1 to C, norm
    attention       1x1 synapses without bias, v has 4 C channels, scale 2 / sqrt(d), and L' is as
                    the other neurons
    blocks of stages 3 and 4      separable with 3x3, attention, ffn

No neuron has a membrane, so time steps do not depend on each other, and one step (T = 1) is as
published. In evaluation the network equals one in which each neuron passes on 4 binary steps
(`IntegerNeuron.binary_steps`), and each synapse sums their currents. BPTT trains it. Rules that
change how gradients pass through the membrane refuse it, so there is no online rule for it.

In float64 the network equals SDT_V3/Classification/Model_Base/models.py of
github.com/BICLab/Spike-Driven-Transformer-V3, commit 00fcd1fd5d9c (docs/LOG.md). Drop path is
declared there but never applied.

Source: Yao et al. 2024 (E-SpikeFormer, arXiv 2411.16061).
"""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from pipeline.models.attention import SelfAttention, SpikingTransformer, block
from pipeline.models.meta_spikeformer import (
    FLAT,
    STAGE_NAMES,
    check_sizes,
    depthwise,
    published_sizes,
    stages,
)
from pipeline.models.parts import StatisticsOver
from pipeline.models.published import PublishedNames, PublishedSize, load_published
from pipeline.models.residual import BlockFactory, Layer, named_sequential
from pipeline.spiking.integer import IntegerNeuron
from pipeline.spiking.norm import BatchNorm

# T time, B batch, C channels, H W pixels, K classes; d channels of a head

LEVELS = 4
VALUE_EXPANSION = 4


class ESpikeFormer(SpikingTransformer):
    """`[T, B, C, H, W]` to `[T, B, K]`, for images of any size.

    Args:
        channels: C0 to C3. C0 must be even, C2 and C3 multiples of `heads`.
        heads: heads of every attention.
        expansion: the factor by which `convolutions` and `ffn` widen the channels.
        over: statistics of batch norm in training; there is no difference at one step.

    Raises: ValueError for sizes below 1 or that do not fit together.
    """

    published = PublishedNames(
        (
            *STAGE_NAMES,
            (r"\.separable\.branch\.(pointwise\d|depthwise)_conv\.", r".Conv.\1.0."),
            (r"\.separable\.branch\.(pointwise\d|depthwise)_bn\.", r".Conv.\1.1."),
            (r"\.Conv\.pointwise", ".Conv.pwconv"),
            (r"\.Conv\.depthwise", ".Conv.dwconv"),
            (r"^(block.*)\.Conv\.", r"\1.conv."),
            (r"\.attn\.(\w+)_conv\.", r".attn.\1_conv.0."),
            (r"\.attn\.(\w+)_bn\.", r".attn.\1_conv.1."),
        ),
        flat=FLAT,
    )

    def __init__(
        self,
        *,
        channels: Sequence[int],
        heads: int,
        classes: int,
        in_channels: int = 3,
        expansion: int = 4,
        over: StatisticsOver = "time",
    ) -> None:
        check_sizes(
            "ESpikeFormer",
            channels,
            heads,
            classes=classes,
            in_channels=in_channels,
            expansion=expansion,
        )
        blocks = BlockFactory(shortcut="membrane", neuron=IntegerNeuron(LEVELS), over=over)

        def attention_block(width: int) -> nn.Module:
            attention = partial(
                SelfAttention,
                blocks,
                width,
                heads=heads,
                scale=2 * (width // heads) ** -0.5,
                values=VALUE_EXPANSION * width,
                project_bias=False,
                threshold=None,
            )
            return named_sequential(
                separable=blocks.wrap(separable(blocks, width, 3)),
                **dict(block(blocks, width, attention, expansion=expansion).named_children()),
            )

        features = stages(
            blocks, (in_channels, *channels), separable, attention_block, expansion=expansion
        )
        last = IntegerNeuron(LEVELS, unit=1)
        super().__init__(features, channels=channels[-1], classes=classes, last=last)


def separable(blocks: BlockFactory, channels: int, kernel_size: int) -> nn.Sequential:
    """A depthwise convolution at twice the channels, with norm and neuron behind it."""
    hidden = 2 * channels
    return named_sequential(
        neuron1=blocks.stream_neuron(),
        pointwise1=blocks.normed_synapse(Layer(channels, hidden)),
        neuron2=blocks.branch_neuron(),
        depthwise=named_sequential(
            synapse=depthwise(hidden, kernel_size, padding=kernel_size // 2),
            norm=BatchNorm(hidden, over=blocks.over),
        ),
        neuron3=blocks.branch_neuron(),
        pointwise2=blocks.normed_synapse(Layer(hidden, channels), gain=blocks.branch_gain),
    )


def from_published(
    published: Mapping[str, Tensor], *, heads: int = 8, over: StatisticsOver = "time"
) -> ESpikeFormer:
    """An ESpikeFormer with published weights. Its sizes are those of the tensors.

    `heads` is not visible in the tensors; it is 8 in the published code.

    Raises: ValueError for missing or unknown tensors, or tensors of another shape.
    """
    return load_published(
        published, lambda: ESpikeFormer(**published_sizes(published), heads=heads, over=over)
    )


PUBLISHED_SIZES = tuple(
    PublishedSize(
        "E-SpikeFormer",
        size,
        parameters,
        top1,
        "2411.16061",
        partial(ESpikeFormer, channels=channels, heads=8, classes=1000),
    )
    for size, channels, parameters, top1 in (
        ("T", (24, 48, 96, 128), 2_702_048, "-"),
        ("S", (32, 64, 128, 192), 5_105_608, "-"),
        ("M", (48, 96, 192, 240), 10_023_112, "78.5, T=1, D=4"),
        ("L", (64, 128, 256, 360), 18_987_504, "79.8, T=1, D=4"),
    )
)
