"""Meta-SpikeFormer (Spike-driven Transformer, version 2): convolutions first, then attention.

    stage    size    channels    blocks, each a sum of the stream and one branch
    0        1/2     C0/2        1 time separable, convolutions
    1        1/4     C0          1 time separable, convolutions
    2        1/8     C1          2 times separable, convolutions
    3        1/16    C2          6 times attention, ffn
    4        1/16    C3          2 times attention, ffn

    each stage starts with   neuron, synapse, norm   (the first stage without a neuron)
    separable       neuron, 1x1 to 2 C, norm, neuron, depthwise 7x7, 1x1 to C, norm
    convolutions    neuron, 3x3 to 4 C, norm, neuron, 3x3 to C, norm
    attention       SelfAttention (`models/attention.py`), each of whose synapses is a `rep_conv`
    head            mean over tokens, neuron, linear classifier

The shortcuts add currents ("membrane", `models/residual.py`). Sizes are rounded up.

In float64 the network equals classification/models.py of
github.com/BICLab/Spike-Driven-Transformer-V2, commit 35f245f4f79a (docs/LOG.md). Drop path is
declared there but never applied.

Source: Yao et al. 2024 (Meta-SpikeFormer, arXiv 2404.03663).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
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
from pipeline.models.published import PublishedNames, PublishedSize, load_published, sizes
from pipeline.models.residual import BlockFactory, Layer, named_sequential
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.slice_cache import StaticInput
from pipeline.spiking.synapse import Conv2d, Linear

# T time, B batch, C channels, H W pixels, K classes

DEPTHS = (1, 1, 2, 6, 2)
_DOWNSAMPLES = ("1_1", "1_2", "2", "3", "4")


def _stage_name(match: re.Match[str]) -> str:
    stage = int(match[1])
    if match[2] == "downsample":
        return f"downsample{_DOWNSAMPLES[stage]}.encode."
    if stage >= 3:
        return f"block{stage}.{match[3]}."
    return f"ConvBlock{_DOWNSAMPLES[stage] if stage < 2 else f'2_{int(match[3]) + 1}'}.0."


STAGE_NAMES = (
    (r"^features\.(\d)\.(downsample|blocks\.(\d))\.", _stage_name),
    *BLOCK_NAMES,
    (r"^(ConvBlock.*)\.mlp\.fc(\d)_(conv|bn)\.", r"\1.\3\2."),
)
FLAT = r"\.mlp\.\w+_conv\.weight$"


class MetaSpikeFormer(SpikingTransformer):
    """`[T, B, C, H, W]` to `[T, B, K]`, for images of any size.

    Args:
        channels: C0 to C3. C0 must be even, C2 and C3 multiples of `heads`.
        heads: heads of every attention.
        expansion: the factor by which `convolutions` and `ffn` widen the channels, 4 above.
        distilled: whether there is a second classifier, which the published code trains on the
            answers of a teacher. The logits are then the mean of both, as published in evaluation.
            In training the published code returns both.
        over: statistics of batch norm in training. "time" is as published; rules that run in slices
            need "step".

    Raises: ValueError for sizes below 1 or that do not fit together.
    """

    published = PublishedNames(
        (
            (r"^classifier\.own\.", "head."),
            (r"^classifier\.distilled\.", "head_kd."),
            *STAGE_NAMES,
            (r"\.separable\.branch\.pointwise(\d)_conv\.", r".Conv.pwconv\1."),
            (r"\.separable\.branch\.pointwise(\d)_bn\.", r".Conv.bn\1."),
            (r"\.separable\.branch\.depthwise\.", ".Conv.dwconv."),
            (r"\.attn\.(\w+)\.0\.", r".attn.\1_conv.0.body."),
            (r"\.attn\.(\w+)\.1\.", r".attn.\1_conv.1."),
            (r"\.body\.1\.", ".body.1.bn."),
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
        distilled: bool = False,
        over: StatisticsOver = "time",
        neuron: nn.Module = NEURON,
    ) -> None:
        check_sizes(
            "MetaSpikeFormer",
            channels,
            heads,
            classes=classes,
            in_channels=in_channels,
            expansion=expansion,
        )
        blocks = BlockFactory(shortcut="membrane", neuron=neuron, over=over)

        def attention_block(width: int) -> nn.Module:
            build = partial(rep_conv, blocks)
            attention = partial(SelfAttention, blocks, width, heads=heads, normed_synapse=build)
            return block(blocks, width, attention, expansion=expansion)

        features = stages(
            blocks, (in_channels, *channels), separable, attention_block, expansion=expansion
        )
        last = blocks.stream_neuron()
        super().__init__(features, channels=channels[-1], classes=classes, last=last)
        if distilled:
            self.classifier = TwoClassifiers(channels[-1], classes)


def check_sizes(who: str, channels: Sequence[int], heads: int, **counts: int) -> None:
    refuse_unless_counts(who, counts | {"heads": heads, "channels": channels})
    require(
        len(channels) == 4 and channels[0] % 2 == channels[2] % heads == channels[3] % heads == 0,
        f"{who}: channels must be four numbers, the first even, the last two multiples of heads;"
        f" got {channels=}, {heads=}",
    )


def stages(
    blocks: BlockFactory,
    channels: Sequence[int],
    separable: Callable[[BlockFactory, int, int], nn.Module],
    attention_block: Callable[[int], nn.Module],
    *,
    expansion: int,
) -> nn.Sequential:
    """The five stages. `channels` starts with those of the image."""

    def conv_block(width: int) -> nn.Module:
        inner = width * expansion
        return named_sequential(
            separable=blocks.wrap(separable(blocks, width, 7)),
            ffn=blocks.residual(
                [Layer(width, inner, 3), Layer(inner, width, 3)], last_gain=blocks.branch_gain
            ),
        )

    features = nn.Sequential()
    before, *others = channels
    for index, (width, depth) in enumerate(zip((others[0] // 2, *others), DEPTHS, strict=True)):
        kernel, stride = 3 if index else 7, 1 if index == len(DEPTHS) - 1 else 2
        downsample = blocks.normed_synapse(Layer(before, width, kernel, stride, bias=True))
        build = conv_block if index < 3 else attention_block
        features.append(
            named_sequential(
                downsample=named_sequential(
                    neuron=blocks.stream_neuron(), **dict(downsample.named_children())
                )
                if index
                else StaticInput.of(downsample),
                blocks=nn.Sequential(*(build(width) for _ in range(depth))),
            )
        )
        before = width
    return features


def separable(blocks: BlockFactory, channels: int, kernel_size: int) -> nn.Sequential:
    """A depthwise convolution at twice the channels, without norm and neuron behind it."""
    hidden = 2 * channels
    return named_sequential(
        neuron1=blocks.stream_neuron(),
        pointwise1=blocks.normed_synapse(Layer(channels, hidden)),
        neuron2=blocks.branch_neuron(),
        depthwise=depthwise(hidden, kernel_size, padding=kernel_size // 2),
        pointwise2=blocks.normed_synapse(Layer(hidden, channels), gain=blocks.branch_gain),
    )


def depthwise(channels: int, kernel_size: int, *, padding: int) -> Conv2d:
    return Conv2d(channels, channels, kernel_size, padding=padding, groups=channels, bias=False)


def rep_conv(blocks: BlockFactory, layer: Layer, *, gain: float | None = None) -> nn.Sequential:
    """norm(norm(1x1(depthwise 3x3(padded norm(1x1(x)))))), without neurons between them.

    In evaluation it is linear, so it can be replaced by one 3x3 convolution with a bias.
    """
    channels = layer.in_channels
    last = BatchNorm(layer.out_channels, over=blocks.over)
    nn.init.constant_(last.weight, 1.0 if gain is None else gain)
    body = nn.Sequential(
        Conv2d(channels, channels, 1, bias=False),
        PaddedNorm(channels, over=blocks.over),
        nn.Sequential(
            depthwise(channels, 3, padding=0),
            Conv2d(channels, layer.out_channels, 1, bias=False),
            BatchNorm(layer.out_channels, over=blocks.over),
        ),
    )
    return nn.Sequential(body, last)


class PaddedNorm(BatchNorm):
    """Batch norm, then one pixel of padding on each side: `[T, B, C, H + 2, W + 2]`.

    The padding has the value that 0 would have after the norm with the running statistics, also in
    training. It has no gradient.
    """

    def forward(self, x_TBC: Tensor) -> Tensor:
        if self.uses_batch_statistics and self.over == "step" and len(x_TBC) > 1:
            # The running statistics after each step, as if the steps were passed one by one.
            return torch.cat([self(x_1BC) for x_1BC in x_TBC.split(1)])
        y_TBCHW = super().forward(x_TBC)
        with torch.no_grad():
            scale_C = self.weight / (self.running_var + self.eps).sqrt()
            padding_C = (self.bias - self.running_mean * scale_C).to(y_TBCHW.dtype)
        *steps, height, width = y_TBCHW.shape
        padded_TBCHW = padding_C.view(-1, 1, 1).expand(*steps, height + 2, width + 2).clone()
        padded_TBCHW[..., 1:-1, 1:-1] = y_TBCHW
        return padded_TBCHW


class TwoClassifiers(nn.Module):
    """The mean of the logits of two classifiers: `[T, B, C]` to `[T, B, K]`."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.own = Linear(channels, classes)
        self.distilled = Linear(channels, classes)

    def forward(self, x_TBC: Tensor) -> Tensor:
        return (self.own(x_TBC) + self.distilled(x_TBC)) / 2


def from_published(
    published: Mapping[str, Tensor], *, heads: int = 8, over: StatisticsOver = "time"
) -> MetaSpikeFormer:
    """A MetaSpikeFormer with published weights. Its sizes are those of the tensors.

    `heads` is not visible in the tensors; it is 8 in the published code.

    Raises: ValueError for missing or unknown tensors, or tensors of another shape.
    """
    return load_published(
        published,
        lambda: MetaSpikeFormer(
            **published_sizes(published),
            heads=heads,
            distilled="head_kd.weight" in published,
            over=over,
        ),
    )


def published_sizes(published: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sizes of the stages and of the classifier."""
    channels = [
        sizes(published, f"downsample{name}.encode_conv.weight", 4)[0] for name in _DOWNSAMPLES[1:]
    ]
    hidden = sizes(published, "block3.0.mlp.fc1_conv.weight", 3)[0]
    return {
        "channels": channels,
        "classes": sizes(published, "head.weight", 2)[0],
        "in_channels": sizes(published, "downsample1_1.encode_conv.weight", 4)[1],
        "expansion": hidden // channels[2],
    }


PUBLISHED_SIZES = tuple(
    PublishedSize(
        "Meta-SpikeFormer",
        f"8-{channels[2]}",
        parameters,
        top1,
        "2404.03663",
        partial(MetaSpikeFormer, channels=channels, heads=8, classes=1000),
    )
    for channels, parameters, top1 in (
        ((96, 192, 384, 480), 31_333_864, "-"),
        ((128, 256, 512, 640), 55_350_248, "80.0, T=4, distilled"),
        ((192, 384, 768, 960), 123_741_160, "-"),
    )
)
