"""The residual blocks of spiking networks: modules, and one factory for all kinds of shortcut.

S is a synapse, N its norm, L a neuron; h = first(x), y = last(shortcut + branch(h)):

    shortcut            first   branch        last   addition to x             stream
    "post_activation"           S N L S N     L      currents                  spikes 0, 1
    "sew"                       S N L S N L          spikes                    whole numbers
    "membrane"          L       S N L S N            currents                  real numbers
    "multiple"          L       S N                  currents of each synapse  real numbers
    "sew_multiple"              S N L                spikes of each synapse    multiples of 1/r

Under "membrane" and "multiple" the synapses of branches read spikes. "multiple" and "sew_multiple"
put a shortcut around each synapse with its neuron and norm, because two binary layers between
shortcuts lose too much information. "multiple_all" is "multiple" with shortcuts around the
projections of an attention as well (`models/qkformer.py`). If only the number of channels changes,
by a whole factor, such a shortcut repeats the channels, or averages groups of r channels. For any
other change of shape the shortcut is a 1x1 synapse with its norm, and under "sew_multiple" with a
neuron. If the stride is above 1, an average pool before the synapse replaces the stride. A mean of
spikes is a fraction, so later synapses of "sew_multiple" read fractions.

`norm="sws"` is the normaliser-free form of the real-valued streams, with standardised weights
instead of batch norm:

    y = x + ALPHA skip_gain branch(gain L(x / beta))
    with gain L( . ) before every further synapse of the branch

beta is the expected standard deviation of the stream. gain restores the variance that a spike
removes. skip_gain starts at 0. A synapse in the shortcut reads gain L(x / beta). No batch
statistics are used, so such a network can run one time step at a time.

Source: He et al. 2016 (arXiv 1512.03385), Fang et al. 2021 (SEW, arXiv 2102.04159), Hu et al. 2021
(MS, arXiv 2112.08954), Brock et al. 2021 (NF, arXiv 2101.08692); multiple shortcuts: Liu et al.
2018 (Bi-Real, arXiv 1808.00278), Le & Li 2023 (BinaryViT, arXiv 2306.16678).
"""

# T time, B batch, C channels, H W pixels

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_one_of, require
from pipeline.models.parts import (
    Pool,
    StatisticsOver,
    copy_neuron,
    scaled_spikes,
    standardized_conv,
    variance_gain,
)
from pipeline.spiking.dropout import DropPath
from pipeline.spiking.kernels.scaled_add import scaled_add
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.synapse import Conv2d

Shortcut = Literal["post_activation", "sew", "sew_multiple", "membrane", "multiple", "multiple_all"]
Norm = Literal["batch", "sws"]
ShortcutOf = Literal["stream", "first"]

# The weight of each normaliser-free branch: it adds ALPHA^2 to the variance of the stream.
ALPHA = 0.2


class Layer(NamedTuple):
    """The sizes of a convolution with its norm.

    Only the stride and `pools` change the image size. `pools` adds a max pool of stride 2 after the
    norm.
    """

    in_channels: int
    out_channels: int
    kernel_size: int = 1
    stride: int = 1
    bias: bool = False
    pools: bool = False


class BlockFactory:
    """Creates the layers of one network in order, and tracks the expected variance of its stream.

    Args:
        shortcut: see the head of the file.
        neuron: the prototype; every layer gets a copy.
        norm: "batch" or "sws".
        over: batch norm takes its statistics over the samples of each step ("step"), or over all
            steps and samples ("time").
        norm_gain: initial gain of batch norms.

    `carries_spikes` says whether the stream consists of spikes, or of sums or means of spikes.
    Synapses read such a stream directly, without a neuron. `branch_gain` is the initial gain of a
    branch's last batch norm. On a real-valued stream it is 0, so that a block starts as the
    identity. Otherwise every branch would add variance, until few neurons that read the stream are
    near their threshold. On a stream of spikes it is None, and `norm_gain` is used.

    The expected variance of a normaliser-free stream is `shared_variance` + `own_variance`: 1 after
    a standardised synapse, plus ALPHA^2 per branch. After channels are repeated, each copy has its
    own branches, which add to `own_variance`.

    Raises: ValueError for an unknown `shortcut` or `norm`; for "sws" with a shortcut other than
    "membrane" and "multiple", or with a neuron that scales its input.
    """

    def __init__(
        self,
        *,
        shortcut: Shortcut,
        neuron: nn.Module,
        norm: Norm = "batch",
        over: StatisticsOver = "step",
        norm_gain: float = 1.0,
    ) -> None:
        refuse_unless_one_of("BlockFactory", get_args(Shortcut), shortcut=shortcut)
        refuse_unless_one_of("BlockFactory", get_args(Norm), norm=norm)
        require(
            norm != "sws" or shortcut in ("membrane", "multiple"),
            "BlockFactory: norm='sws' needs shortcut='membrane' or 'multiple', whose streams it"
            f" scales; got {shortcut=}",
        )
        require(
            norm != "sws" or not getattr(neuron, "scale_input", False),
            "BlockFactory: norm='sws' needs currents of unit variance, so the neuron must not scale"
            " its input; got scale_input=True",
        )
        self.shortcut: Shortcut = shortcut
        self.carries_spikes = shortcut in ("post_activation", "sew", "sew_multiple")
        self.branch_gain = None if self.carries_spikes else 0.0
        self.is_multiple = shortcut in ("multiple", "multiple_all", "sew_multiple")
        self.prototype = neuron
        self.is_sws = norm == "sws"
        self.over: StatisticsOver = over
        self.norm_gain = norm_gain
        self.gain = variance_gain(neuron)
        self.shared_variance, self.own_variance = 1.0, 0.0

    # --------------------------------------------------------------------------------------- layers

    def neuron(self, *, threshold: float | None = None) -> nn.Module:
        """A copy of the prototype.

        `threshold` replaces the prototype's threshold, and scales its reset by the same factor. It
        has no effect on `nn.ReLU`.

        Raises: ValueError for a `threshold` if the prototype is neither a plain LIF nor `nn.ReLU`.
        """
        neuron: Any = copy_neuron(self.prototype)
        if threshold is not None and not isinstance(neuron, nn.ReLU):
            require(
                type(neuron) is LIF,
                f"BlockFactory: neuron must be a plain LIF to get a threshold of {threshold}; got"
                f" {type(neuron).__name__}",
            )
            neuron.subtract = neuron.subtract * threshold / neuron.threshold
            neuron.threshold = threshold
        return neuron

    def branch_neuron(self, *, threshold: float | None = None) -> nn.Module:
        """A neuron between two synapses of a branch; under "sws" `gain` scales its output."""
        neuron = self.neuron(threshold=threshold)
        return Rescaled(neuron, gain=self.gain) if self.is_sws else neuron

    def stream_neuron(self) -> nn.Module:
        """A neuron that reads the stream after all branches so far."""
        neuron, beta = self.neuron(), (self.shared_variance + self.own_variance) ** 0.5
        return Rescaled(neuron, gain=self.gain, beta=beta) if self.is_sws else neuron

    def synapse(self, layer: Layer) -> Conv2d:
        """The convolution of a layer; under "sws" it always has a bias."""
        in_channels, out_channels, kernel_size, stride = layer[:4]
        if self.is_sws:
            return standardized_conv(in_channels, out_channels, kernel_size, stride=stride)
        return Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=layer.bias
        )

    def normed_synapse(self, layer: Layer, *, gain: float | None = None) -> nn.Sequential:
        """Synapse, norm and pool of a layer; `gain` is the initial gain of batch norm."""
        parts: dict[str, nn.Module] = {"synapse": self.synapse(layer)}
        if not self.is_sws:
            parts["norm"] = norm = BatchNorm(layer.out_channels, over=self.over)
            nn.init.constant_(norm.weight, self.norm_gain if gain is None else gain)
        if layer.pools:
            parts["pool"] = Pool(nn.MaxPool2d(3, stride=2, padding=1))
        return named_sequential(**parts)

    # ------------------------------------------------------------------------------------ residuals

    def residual(
        self,
        layers: Sequence[Layer],
        *,
        last_gain: float | None = None,
        pooled: bool = False,
        drop_path: float = 0.0,
    ) -> nn.Module:
        """One residual block of `layers`, or with multiple shortcuts one block per layer.

        `last_gain` is the initial gain of a branch's last batch norm (0: the block starts as the
        identity). `pooled` replaces the stride of a shortcut's 1x1 synapse by an average pool
        before the synapse. Multiple shortcuts are always pooled. Under "sws" no shortcut is pooled.
        """
        build = partial(self.one_residual, last_gain=last_gain, drop_path=drop_path)
        if self.is_multiple:
            return nn.Sequential(*(build([layer], pooled=True) for layer in layers))
        return build(layers, pooled=pooled)

    def one_residual(
        self,
        layers: Sequence[Layer],
        *,
        last_gain: float | None = None,
        pooled: bool = False,
        drop_path: float = 0.0,
        shortcut_of: ShortcutOf = "stream",
    ) -> nn.Module:
        """A single residual block of `layers`, with any kind of shortcut.

        `shortcut_of` is the input of the shortcut: the stream, or the output of the first neuron.
        A normaliser-free 1x1 synapse always reads the first neuron.
        """
        first = None if self.carries_spikes else self.stream_neuron()
        branch = nn.Sequential()
        for layer in layers[:-1]:
            branch.extend([self.normed_synapse(layer), self.branch_neuron()])
        branch.append(self.normed_synapse(layers[-1], gain=last_gain))
        if self.shortcut in ("sew", "sew_multiple"):
            branch.append(self.neuron())
        shortcut, has_synapse = self._shortcut(
            layers[0].in_channels,
            layers[-1].out_channels,
            math.prod(2 * layer.stride if layer.pools else layer.stride for layer in layers),
            pooled=pooled,
        )
        return Residual(
            branch,
            shortcut,
            first=first,
            last=self.neuron() if self.shortcut == "post_activation" else None,
            # A standardised synapse needs an input of unit variance, so it cannot read the stream.
            shortcut_of="first" if self.is_sws and has_synapse else shortcut_of,
            alpha=ALPHA if self.is_sws else None,
            drop_path=drop_path,
        )

    def wrap(self, branch: nn.Module, *, drop_path: float = 0.0) -> nn.Module:
        """Put a shortcut around a branch that keeps the shape, such as an attention.

        It does not support "post_activation".
        """
        self._add_branch_variance()
        return Residual(branch, alpha=ALPHA if self.is_sws else None, drop_path=drop_path)

    def _shortcut(
        self, in_channels: int, out_channels: int, stride: int, *, pooled: bool
    ) -> tuple[nn.Module | None, bool]:
        """The shortcut (None: the identity), and whether it has a synapse.

        The call also updates the expected variance of the stream.
        """
        if stride == 1 and in_channels == out_channels:
            self._add_branch_variance()
            return None, False
        if self.is_multiple and stride == 1 and out_channels % in_channels == 0:
            self.own_variance += ALPHA**2
            return Repeat(out_channels // in_channels), False
        if self.is_multiple and stride == 1 and in_channels % out_channels == 0:
            copies = in_channels // out_channels
            # A mean over copies divides their own variance, and keeps the variance that they share.
            self.shared_variance += self.own_variance / copies + ALPHA**2
            self.own_variance = 0.0
            return GroupMean(copies), False
        self.shared_variance, self.own_variance = 1.0 + ALPHA**2, 0.0
        projection = nn.Sequential()
        # Under "sws" there is no pool, because a pool would reduce the variance below 1.
        pools = pooled and stride > 1 and not self.is_sws
        if pools:
            projection.append(Pool(nn.AvgPool2d(stride, ceil_mode=True)))
        projection.append(
            self.normed_synapse(Layer(in_channels, out_channels, stride=1 if pools else stride))
        )
        if self.shortcut in ("sew", "sew_multiple"):
            projection.append(self.neuron())
        return projection, True

    def _add_branch_variance(self) -> None:
        if self.own_variance:
            self.own_variance += ALPHA**2
        else:
            self.shared_variance += ALPHA**2


def resnet_stages(
    factory: BlockFactory,
    blocks: Sequence[int],
    width: int,
    *,
    bottleneck: bool = False,
    first_stride: int = 1,
    last_gain: float | None = None,
    pooled: bool = False,
    drop_path: float = 0.0,
) -> tuple[nn.Sequential, int]:
    """Stages of blocks. Stage i has `blocks[i]` blocks of width `width * 2**i`.

    The first stage starts with `first_stride`, every other stage with stride 2. The share of
    `drop_path` grows linearly from 0 at the first block to `drop_path` at the last. `last_gain` and
    `pooled` are arguments of `BlockFactory.residual`.

    Returns: the stages, and the number of output channels.
    """
    stages = nn.Sequential()
    channels = width
    shares = iter(drop_path * index / max(1, sum(blocks) - 1) for index in range(sum(blocks)))
    for index, count in enumerate(blocks):
        stage = nn.Sequential()
        inner = width * 2**index  # channels of the 3x3 convolutions
        for stride in [2 if index else first_stride, *[1] * (count - 1)]:
            layers = (  # in a bottleneck the 3x3 convolution has the stride
                [Layer(channels, inner), Layer(inner, inner, 3, stride), Layer(inner, 4 * inner)]
                if bottleneck
                else [Layer(channels, inner, 3, stride), Layer(inner, inner, 3)]
            )
            stage.append(
                factory.residual(layers, last_gain=last_gain, pooled=pooled, drop_path=next(shares))
            )
            channels = layers[-1].out_channels
        stages.append(stage)
    return stages, channels


def named_sequential(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


class Residual(nn.Module):
    """h = first(x), y = last(shortcut(x) + branch(h)), or with shortcut(h) instead of shortcut(x).

    With `alpha` the branch has the weight alpha times a learnable `skip_gain`.
    """

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        *,
        first: nn.Module | None = None,
        last: nn.Module | None = None,
        shortcut_of: ShortcutOf = "stream",
        alpha: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.first = nn.Identity() if first is None else first
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.last = nn.Identity() if last is None else last
        self.shortcut_of = shortcut_of
        self.alpha = alpha
        # Shape (1,), because DeepSpeed 0.19.8 cannot broadcast a scalar.
        self.skip_gain = None if alpha is None else nn.Parameter(torch.zeros(1))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        h = self.first(x_TBCHW)
        shortcut = self.shortcut(h if self.shortcut_of == "first" else x_TBCHW)
        branch = self.drop_path(self.branch(h))
        if self.skip_gain is None or self.alpha is None:
            # The branch comes first, because a sum has the memory order of its first term, and the
            # results of `Repeat` and `GroupMean` are contiguous.
            return self.last(branch + shortcut)
        return self.last(scaled_add(shortcut, branch, self.skip_gain, self.alpha))


class Repeat(nn.Module):
    """Repeat all channels: `[T, B, C, ...]` to `[T, B, times C, ...]`."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x_TBC: Tensor) -> Tensor:
        return torch.cat([x_TBC] * self.times, dim=2)


class GroupMean(nn.Module):
    """Average over the copies that `Repeat` makes: `[T, B, group C, ...]` to `[T, B, C, ...]`."""

    def __init__(self, group: int) -> None:
        super().__init__()
        self.group = group

    def forward(self, x_TBC: Tensor) -> Tensor:
        return x_TBC.unflatten(2, (self.group, -1)).mean(2)


class Rescaled(nn.Module):
    """gain L(x / beta): spikes of unit variance from a current of variance beta^2."""

    def __init__(self, neuron: nn.Module, *, gain: float, beta: float = 1.0) -> None:
        super().__init__()
        self.neuron = neuron
        self.gain = gain
        self.beta = beta

    def forward(self, x_TB: Tensor) -> Tensor:
        return scaled_spikes(self.neuron, x_TB, gain=self.gain, beta=self.beta)
