"""The stages of a ResNet, which SEW-, MS- and NF-ResNet share: blocks of doubling width on a smaller and smaller image."""

from collections.abc import Sequence

from torch import nn

from pipeline.models.residual import Blocks, Layer


def resnet_stages(
    factory: Blocks,
    blocks: Sequence[int],
    width: int,
    *,
    bottleneck: bool = False,
    first_stride: int = 1,
    last_gain: float | None = None,
    pooled: bool = False,
    drop_path: float = 0.0,
) -> tuple[nn.Sequential, int]:
    """Stage i has `blocks[i]` blocks of width `width * 2**i` and begins with stride 2, the first with `first_stride`.

    `drop_path` is the share at the last block, to which it grows linearly; `last_gain` and `pooled` are `Blocks.residual`'s.

    Returns: the stages, and the channels that leave them.
    """
    stages = nn.Sequential()
    channels, built, last = width, 0, max(1, sum(blocks) - 1)
    for index, count in enumerate(blocks):
        stage = nn.Sequential()
        for position in range(count):
            stride = 1 if position else 2 if index else first_stride
            layers = resnet_layers(channels, width * 2**index, stride=stride, bottleneck=bottleneck)
            stage.append(factory.residual(layers, last_gain=last_gain, pooled=pooled, drop_path=drop_path * built / last))
            channels, built = layers[-1].out_channels, built + 1
        stages.append(stage)
    return stages, channels


def resnet_layers(in_channels: int, width: int, *, stride: int, bottleneck: bool) -> list[Layer]:
    """What a block of a ResNet is made of; in a bottleneck the 3x3 has the stride."""
    if bottleneck:
        return [Layer(in_channels, width), Layer(width, width, 3, stride), Layer(width, 4 * width)]
    return [Layer(in_channels, width, 3, stride), Layer(width, width, 3)]
