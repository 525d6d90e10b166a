"""The residual blocks of spiking networks: modules, and one factory for all kinds of shortcut.

S is a synapse, N its norm, L a neuron; h = first(x), y = last(shortcut + branch(h)):

    shortcut            first   branch        last   addition to x             stream
    "post_activation"           S N L S N     L      currents                  spikes 0, 1
    "sew"                       S N L S N L          spikes                    whole numbers
    "membrane"          L       S N L S N            currents                  real numbers
    "multiple"          L       S N                  currents of each synapse  real numbers
    "sew_multiple"              S N L                spikes of each synapse    multiples of 1/r

Under "membrane" and "multiple" the synapses see spikes. The last two put a shortcut around every
neuron, synapse and norm, because two binary layers between shortcuts lose too much. "multiple_all"
is "multiple" with shortcuts around the projections of an attention as well (`models/qkformer.py`).
Where the number of channels changes by a whole factor, such a shortcut repeats the channels, or
averages groups of r channels. Where the stride changes, it is an average pool and a 1x1 synapse
with its norm. A mean over groups of spikes is graded, so later synapses of "sew_multiple" see
fractions.

`norm="sws"` is the normaliser-free form of the real-valued streams, with standardised weights
instead of batch norm:

    y = x + ALPHA skip_gain branch(gain L(x / beta))
    with gain L( . ) before every further synapse of the branch

beta is the expected standard deviation of the stream, gain restores the variance that a spike
removes, and skip_gain starts at 0. A change of shape reads gain L(x / beta). No batch statistics
are used, so such a network can run one time step at a time.

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
from pipeline.models.parts import Over, Pool, copy_neuron, standardized_conv, variance_gain
from pipeline.spiking.dropout import DropPath
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.synapse import Conv2d

Shortcut = Literal["post_activation", "sew", "sew_multiple", "membrane", "multiple", "multiple_all"]
Norm = Literal["batch", "sws"]
ShortcutOf = Literal["stream", "first"]

# The weight of each normaliser-free branch: it adds ALPHA^2 to the variance of the stream.
ALPHA = 0.2


class Layer(NamedTuple):
    """A convolution that keeps the image size up to its stride.

    `pools` adds a max pool of stride 2 after its norm.
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
        over: statistics of batch norm: of each time step, or over T and B together.
        norm_gain: initial gain of batch norms.

    `carries_spikes` says whether the stream consists of spikes, their sums or means; synapses read
    such a stream without a neuron. `branch_gain` is the initial gain of a branch's last batch norm.
    On a real-valued stream it is 0, so that a block starts as the identity; otherwise every branch
    would add variance, until few neurons that read the stream are near their threshold. On a stream
    of spikes it is None, because there is no such problem.

    The expected variance of a normaliser-free stream is `shared` + `own`: 1 after a standardised
    synapse, plus ALPHA^2 per branch. `own` was added since channels were repeated, independently in
    each copy.

    Raises: ValueError for an unknown `shortcut` or `norm`, or for "sws" on a stream of spikes.
    """

    def __init__(
        self,
        *,
        shortcut: Shortcut,
        neuron: nn.Module,
        norm: Norm = "batch",
        over: Over = "step",
        norm_gain: float = 1.0,
    ) -> None:
        refuse_unless_one_of("BlockFactory", get_args(Shortcut), shortcut=shortcut)
        refuse_unless_one_of("BlockFactory", get_args(Norm), norm=norm)
        require(
            norm != "sws" or shortcut in ("membrane", "multiple"),
            "norm='sws' needs shortcut='membrane' or 'multiple', whose streams it scales; got"
            f" {shortcut=}",
        )
        require(
            norm != "sws" or not getattr(neuron, "scale_input", False),
            "norm='sws' counts on currents of unit variance, which scale_input shrinks; got a"
            " neuron with scale_input",
        )
        self.shortcut: Shortcut = shortcut
        self.carries_spikes = shortcut in ("post_activation", "sew", "sew_multiple")
        self.branch_gain = None if self.carries_spikes else 0.0
        self.is_multiple = shortcut in ("multiple", "multiple_all", "sew_multiple")
        self.prototype = neuron
        self.is_sws = norm == "sws"
        self.over: Over = over
        self.norm_gain = norm_gain
        self.gain = variance_gain(neuron)
        self.shared, self.own = 1.0, 0.0

    # --------------------------------------------------------------------------------------- layers

    def neuron(self, *, threshold: float | None = None) -> nn.Module:
        """A copy of the prototype.

        A given `threshold` replaces its own, and the reset is scaled with it.

        Raises: ValueError for a threshold if the neuron has one and is not a plain LIF.
        """
        neuron: Any = copy_neuron(self.prototype)
        if threshold is not None and not isinstance(neuron, nn.ReLU):
            require(
                type(neuron) is LIF,
                f"neuron must be a LIF to get a threshold of {threshold}; got"
                f" {type(neuron).__name__}",
            )
            neuron.subtract = neuron.subtract * threshold / neuron.threshold
            neuron.threshold = threshold
        return neuron

    def spikes(self, *, threshold: float | None = None) -> nn.Module:
        """A neuron before a further synapse; under "sws" its output has unit variance."""
        neuron = self.neuron(threshold=threshold)
        return Rescaled(neuron, gain=self.gain) if self.is_sws else neuron

    def stream_spikes(self) -> nn.Module:
        """A neuron that reads the stream at the current position."""
        return (
            Rescaled(self.neuron(), gain=self.gain, beta=(self.shared + self.own) ** 0.5)
            if self.is_sws
            else self.neuron()
        )

    def synapse(self, layer: Layer) -> Conv2d:
        """The convolution of a layer; under "sws" it always has a bias."""
        in_channels, out_channels, size, stride = layer[:4]
        if self.is_sws:
            return standardized_conv(in_channels, out_channels, size, stride=stride)
        return Conv2d(in_channels, out_channels, size, stride, size // 2, bias=layer.bias)

    def currents(self, layer: Layer, *, gain: float | None = None) -> nn.Sequential:
        """Synapse, norm and pool; `gain` is the initial gain of batch norm."""
        parts: dict[str, nn.Module] = {"synapse": self.synapse(layer)}
        if not self.is_sws:
            parts["norm"] = norm = BatchNorm(layer.out_channels, over=self.over)
            nn.init.constant_(norm.weight, self.norm_gain if gain is None else gain)
        if layer.pools:
            parts["pool"] = Pool(nn.MaxPool2d(3, stride=2, padding=1))
        return named(**parts)

    # ------------------------------------------------------------------------------------ residuals

    def residual(
        self,
        layers: Sequence[Layer],
        *,
        last_gain: float | None = None,
        pooled: bool = False,
        drop_path: float = 0.0,
    ) -> nn.Module:
        """One residual block of `layers`, or one per layer with multiple shortcuts.

        `last_gain` is the initial gain of a branch's last batch norm (0: the block starts as the
        identity). `pooled` replaces the stride of a 1x1 shortcut synapse by an average pool before
        it.
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
        """One residual block of `layers` for every kind of shortcut.

        `shortcut_of` is the input of a projection.
        """
        first = None if self.carries_spikes else self.stream_spikes()
        branch = nn.Sequential()
        for layer in layers[:-1]:
            branch.extend([self.currents(layer), self.spikes()])
        branch.append(self.currents(layers[-1], gain=last_gain))
        if self.shortcut in ("sew", "sew_multiple"):
            branch.append(self.neuron())
        shortcut, projects = self._shortcut(
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
            # A normaliser-free projection needs an input of unit variance, so not the stream.
            shortcut_of="first" if self.is_sws and projects else shortcut_of,
            alpha=ALPHA if self.is_sws else None,
            drop_path=drop_path,
        )

    def wrap(self, branch: nn.Module, *, drop_path: float = 0.0) -> nn.Module:
        """A shortcut around a branch that keeps the shape, such as an attention.

        It does not support "post_activation".
        """
        self._add_branch()
        return Residual(branch, alpha=ALPHA if self.is_sws else None, drop_path=drop_path)

    def _shortcut(
        self, in_channels: int, out_channels: int, stride: int, *, pooled: bool
    ) -> tuple[nn.Module | None, bool]:
        """The shortcut, and whether it has its own synapse."""
        if stride == 1 and in_channels == out_channels:
            self._add_branch()
            return None, False
        if self.is_multiple and stride == 1 and out_channels % in_channels == 0:
            self.own += ALPHA**2
            return Repeat(out_channels // in_channels), False
        if self.is_multiple and stride == 1 and in_channels % out_channels == 0:
            group = in_channels // out_channels
            # The mean over copies divides what is independent in them, and keeps what they share.
            self.shared += self.own / group + ALPHA**2
            self.own = 0.0
            return GroupMean(group), False
        self.shared, self.own = 1.0 + ALPHA**2, 0.0
        projection = nn.Sequential()
        # Under "sws" no pool, because it would reduce the unit variance.
        pools = pooled and stride > 1 and not self.is_sws
        if pools:
            projection.append(Pool(nn.AvgPool2d(stride, ceil_mode=True)))
        projection.append(
            self.currents(Layer(in_channels, out_channels, stride=1 if pools else stride))
        )
        if self.shortcut in ("sew", "sew_multiple"):
            projection.append(self.neuron())
        return projection, True

    def _add_branch(self) -> None:
        if self.own:
            self.own += ALPHA**2
        else:
            self.shared += ALPHA**2


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

    It starts with stride 2, the first stage with `first_stride`.

    `drop_path` is the share at the last block, to which it grows linearly. `last_gain` and `pooled`
    are arguments of `BlockFactory.residual`.

    Returns: the stages, and the number of output channels.
    """
    stages = nn.Sequential()
    channels, built, last = width, 0, max(1, sum(blocks) - 1)
    for index, count in enumerate(blocks):
        stage = nn.Sequential()
        for position in range(count):
            stride = 1 if position else 2 if index else first_stride
            wide = width * 2**index
            layers = (  # in a bottleneck the 3x3 has the stride
                [Layer(channels, wide), Layer(wide, wide, 3, stride), Layer(wide, 4 * wide)]
                if bottleneck
                else [Layer(channels, wide, 3, stride), Layer(wide, wide, 3)]
            )
            stage.append(
                factory.residual(
                    layers, last_gain=last_gain, pooled=pooled, drop_path=drop_path * built / last
                )
            )
            channels, built = layers[-1].out_channels, built + 1
        stages.append(stage)
    return stages, channels


def named(**modules: nn.Module) -> nn.Sequential:
    """A Sequential of modules with these names."""
    return nn.Sequential(OrderedDict(modules))


class Residual(nn.Module):
    """h = first(x), y = last(shortcut + branch(h)), with the shortcut of x or of h.

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
        carried = self.shortcut(h if self.shortcut_of == "first" else x_TBCHW)
        added = self.drop_path(self.branch(h))
        if self.skip_gain is None or self.alpha is None:
            return self.last(carried + added)
        return self.last(torch.addcmul(carried, added, self.skip_gain, value=self.alpha))


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
        return self.gain * self.neuron(x_TB / self.beta if self.beta != 1 else x_TB)
