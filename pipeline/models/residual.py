"""One factory for the residual blocks of spiking networks: what stands in a branch, and what its
shortcut carries.

S a synapse, N its norm, L a neuron; h = first(x), y = last(shortcut + branch(h)):

    shortcut             first   branch       last   what is added                  what the stream
    holds "post_activation"            S N L S N    L      x, currents to spikes          spikes, 0
    or 1
    "sew"                        S N L S N L         x, spikes to spikes            whole numbers 0,
    1, 2, ... "membrane"           L       S N L S N           x, currents to currents        real
    numbers; synapses see spikes "multiple"           L       S N                 x, once for every
    synapse      real numbers; synapses see spikes "sew_multiple"               S N L
    x, once for every synapse      multiples of 1/r

The last two put a shortcut around every triple of neuron, synapse and norm, as binary networks do,
whose layers lose too much to be two between shortcuts. "multiple_all" is "multiple" with shortcuts
around the projections of an attention as well (`models/attention.py`). Where a triple changes the
number of channels by a whole factor, its shortcut repeats the channels or averages groups of them,
of r each; where the stride changes, it is an average pool and a 1x1 synapse with its norm. The mean
over groups of spikes is graded: behind it the synapses of "sew_multiple" see more than whole
numbers.

`norm="sws"` is the normaliser-free form of the streams of real numbers: standardised weights in the
place of batch norm,

    y = x + ALPHA skip_gain branch(gain L(x / beta)),   gain L( . ) before every further synapse of
    the branch

beta the expected standard deviation of the stream, gain what a spike takes from the variance,
skip_gain from 0; a change of shape starts from gain L(x / beta). No statistics of the batch
anywhere: such a network runs one time step at a time.

Source: He et al. 2016 (arXiv 1512.03385), Fang et al. 2021 (SEW, arXiv 2102.04159), Hu et al. 2021
(MS, arXiv 2112.08954), Brock et al. 2021 (NF, arXiv 2101.08692); multiple shortcuts: Liu et al.
2018 (Bi-Real, arXiv 1808.00278), Le & Li 2023 (BinaryViT, arXiv 2306.16678).

The stream of a residual network: what adds to it, what widens and narrows it, and the variance
that it has by then.

Which of them stand in a network, and where, is decided in `models/residual.py`.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_one_of
from pipeline.models.parts import Over, Pool, copy_neuron, standardized_conv, variance_gain
from pipeline.spiking.dropout import DropPath
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.synapse import Conv2d

# T time, B batch, C channels, H W pixels


Shortcut = Literal["post_activation", "sew", "sew_multiple", "membrane", "multiple", "multiple_all"]
Norm = Literal["batch", "sws"]
ShortcutOf = Literal["stream", "first"]

# The weight of each normaliser-free branch: it adds ALPHA^2 to the variance of the stream.
ALPHA = 0.2


class Layer(NamedTuple):
    """A convolution that keeps the size of the image, stride aside; `pools` halves the image, by a
    max pool behind its norm.
    """

    in_channels: int
    out_channels: int
    kernel_size: int = 1
    stride: int = 1
    bias: bool = False
    pools: bool = False


class Blocks:
    """Makes the layers of one network, from stem to head: it keeps count of the variance of the
    stream.

    Args:
        shortcut: as at the head of the file.
        neuron: the prototype that every layer gets a copy of.
        norm: "batch" or "sws".
        over: batch norm's statistics, of each time step or over T and B together.
        norm_gain: where the gains of batch norms start.

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
        refuse_unless_one_of("Blocks", get_args(Shortcut), shortcut=shortcut)
        refuse_unless_one_of("Blocks", get_args(Norm), norm=norm)
        if norm == "sws" and shortcut not in ("membrane", "multiple"):
            raise ValueError(
                "norm='sws' needs shortcut='membrane' or 'multiple', whose streams it scales; got"
                f" {shortcut=}"
            )
        if norm == "sws" and getattr(neuron, "scale_input", False):
            raise ValueError(
                "norm='sws' counts on currents of unit variance, which scale_input shrinks; got a"
                " neuron with scale_input"
            )
        self.shortcut: Shortcut = shortcut
        self.prototype = neuron
        self.is_sws = norm == "sws"
        self.over: Over = over
        self.norm_gain = norm_gain
        self.gain = variance_gain(neuron)
        self.stream = StreamVariance()

    @property
    def carries_spikes(self) -> bool:
        """Whether the stream holds spikes, their sums, or means of those, which synapses read
        without a neuron before them.
        """
        return self.shortcut in ("post_activation", "sew", "sew_multiple")

    @property
    def silent(self) -> float | None:
        """Where the gain of a branch's last batch norm starts, for a block that is to be the
        identity at first: streams of real numbers would gain the variance of every branch
        otherwise, until hardly a neuron that reads them is near its threshold. None where the
        stream holds spikes, of which each branch adds more."""
        return None if self.carries_spikes else 0.0

    @property
    def is_multiple(self) -> bool:
        return self.shortcut in ("multiple", "multiple_all", "sew_multiple")

    # --------------------------------------------------------------------------------------- layers

    def neuron(self, *, threshold: float | None = None) -> nn.Module:
        """A copy of the prototype, with a threshold of its own where one is given; its reset is
        moved in proportion.

        Raises: ValueError for a threshold of a neuron that has one and is no plain LIF: a learnable
        one is its own."""
        neuron = copy_neuron(self.prototype)
        if threshold is None or isinstance(neuron, nn.ReLU):
            return neuron
        if type(neuron) is not LIF:
            raise ValueError(
                f"neuron must be a LIF where a threshold of {threshold} is asked for; got"
                f" {type(neuron).__name__}"
            )
        neuron.threshold, neuron.subtract = (
            threshold,
            neuron.subtract * threshold / neuron.threshold,
        )
        return neuron

    def spikes(self, *, threshold: float | None = None) -> nn.Module:
        """A neuron before a further synapse: of unit variance under "sws"."""
        neuron = self.neuron(threshold=threshold)
        return Rescaled(neuron, gain=self.gain) if self.is_sws else neuron

    def stream_spikes(self) -> nn.Module:
        """The neuron that reads the stream where it stands now."""
        return (
            Rescaled(self.neuron(), gain=self.gain, beta=self.stream.variance**0.5)
            if self.is_sws
            else self.neuron()
        )

    def synapse(self, layer: Layer) -> Conv2d:
        """The convolution of a layer; it has its bias under "sws", whatever the layer says."""
        in_channels, out_channels, size, stride = layer[:4]
        if self.is_sws:
            return standardized_conv(in_channels, out_channels, size, stride=stride)
        return Conv2d(in_channels, out_channels, size, stride, size // 2, bias=layer.bias)

    def currents(self, layer: Layer, *, gain: float | None = None) -> nn.Sequential:
        """Synapse, norm and pool; `gain` is where that of the batch norm starts."""
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
        """Shortcut and branch of these layers; one residual for each where there are multiple
        shortcuts.

        `last_gain` is where the last batch norm of a branch starts (0: with the identity); `pooled`
        makes strides of one shortcut for all an average pool and a 1x1 synapse, in the place of a
        1x1 synapse with the stride.
        """
        if self.is_multiple:
            each = [
                self.one_residual([layer], last_gain=last_gain, pooled=True, drop_path=drop_path)
                for layer in layers
            ]
            return nn.Sequential(*each)
        return self.one_residual(layers, last_gain=last_gain, pooled=pooled, drop_path=drop_path)

    def one_residual(
        self,
        layers: Sequence[Layer],
        *,
        last_gain: float | None = None,
        pooled: bool = False,
        drop_path: float = 0.0,
        shortcut_of: ShortcutOf = "stream",
    ) -> nn.Module:
        """All layers in one branch, whatever the shortcut; `shortcut_of` is what a projection
        reads.
        """
        first = None if self.carries_spikes else self.stream_spikes()
        branch = nn.Sequential()
        for layer in layers[:-1]:
            branch.extend([self.currents(layer), self.spikes()])
        branch.append(self.currents(layers[-1], gain=last_gain))
        if self.shortcut in ("sew", "sew_multiple"):
            branch.append(self.neuron())
        stride = math.prod(2 * layer.stride if layer.pools else layer.stride for layer in layers)
        shortcut, projects = self._shortcut(
            layers[0].in_channels, layers[-1].out_channels, stride, pooled=pooled
        )
        return Residual(
            branch,
            shortcut,
            first=first,
            last=self.neuron() if self.shortcut == "post_activation" else None,
            # What a normaliser-free projection reads must have unit variance, which the stream has
            # not.
            shortcut_of="first" if self.is_sws and projects else shortcut_of,
            alpha=ALPHA if self.is_sws else None,
            drop_path=drop_path,
        )

    def around(self, branch: nn.Module, *, drop_path: float = 0.0) -> nn.Module:
        """A branch that reads the stream by itself and keeps its shape, such as an attention; not
        under "post_activation".
        """
        assert self.shortcut != "post_activation"
        self.stream.add()
        return Residual(branch, alpha=ALPHA if self.is_sws else None, drop_path=drop_path)

    def _shortcut(
        self, in_channels: int, out_channels: int, stride: int, *, pooled: bool
    ) -> tuple[nn.Module | None, bool]:
        """The shortcut, and whether it has a synapse of its own."""
        if stride == 1 and in_channels == out_channels:
            self.stream.add()
            return None, False
        if self.is_multiple and stride == 1 and out_channels % in_channels == 0:
            self.stream.repeat()
            return Repeat(out_channels // in_channels), False
        if self.is_multiple and stride == 1 and in_channels % out_channels == 0:
            self.stream.average(in_channels // out_channels)
            return GroupMean(in_channels // out_channels), False
        self.stream.restart()
        projection = nn.Sequential()
        # The pool would take from the variance what standardised weights count on.
        pools = pooled and stride > 1 and not self.is_sws
        if pools:
            projection.append(Pool(nn.AvgPool2d(stride, ceil_mode=True)))
        projection.append(
            self.currents(Layer(in_channels, out_channels, stride=1 if pools else stride))
        )
        if self.shortcut in ("sew", "sew_multiple"):
            projection.append(self.neuron())
        return projection, True


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
    """Stage i has `blocks[i]` blocks of width `width * 2**i` and begins with stride 2, the first
    with `first_stride`.

    `drop_path` is the share at the last block, to which it grows linearly; `last_gain` and `pooled`
    are `Blocks.residual`'s.

    Returns: the stages, and the channels that leave them.
    """
    stages = nn.Sequential()
    channels, built, last = width, 0, max(1, sum(blocks) - 1)
    for index, count in enumerate(blocks):
        stage = nn.Sequential()
        for position in range(count):
            stride = 1 if position else 2 if index else first_stride
            layers = resnet_layers(channels, width * 2**index, stride=stride, bottleneck=bottleneck)
            stage.append(
                factory.residual(
                    layers, last_gain=last_gain, pooled=pooled, drop_path=drop_path * built / last
                )
            )
            channels, built = layers[-1].out_channels, built + 1
        stages.append(stage)
    return stages, channels


def resnet_layers(in_channels: int, width: int, *, stride: int, bottleneck: bool) -> list[Layer]:
    """What a block of a ResNet is made of; in a bottleneck the 3x3 has the stride."""
    if bottleneck:
        return [Layer(in_channels, width), Layer(width, width, 3, stride), Layer(width, 4 * width)]
    return [Layer(in_channels, width, 3, stride), Layer(width, width, 3)]


def named(**modules: nn.Module) -> nn.Sequential:
    """One behind another, under these names."""
    return nn.Sequential(OrderedDict(modules))


# T time, B batch, C channels, H W pixels


class Residual(nn.Module):
    """h = first(x), y = last(shortcut + branch(h)), the shortcut of x or of h; with `alpha` the
    branch has a learnable weight.
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
        # One number, not a scalar: DeepSpeed 0.19.8 cannot broadcast those.
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
    """`[T, B, C, ...]` to `[T, B, times C, ...]`: all channels once more, as often as that."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x_TBC: Tensor) -> Tensor:
        return torch.cat([x_TBC] * self.times, dim=2)


class GroupMean(nn.Module):
    """`[T, B, group C, ...]` to `[T, B, C, ...]`: the mean over the copies that `Repeat` made, so
    that it undoes it.
    """

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

    def extra_repr(self) -> str:
        return f"gain={self.gain:.4g}, beta={self.beta:.4g}"


class StreamVariance:
    """The expected variance of a normaliser-free stream: 1 behind a standardised synapse, ALPHA^2
    more for each branch.
    """

    def __init__(self) -> None:
        self.shared = 1.0
        self.own = 0.0  # what each copy of a repeated stream got by itself

    @property
    def variance(self) -> float:
        return self.shared + self.own

    def add(self) -> None:
        if self.own:
            self.own += ALPHA**2
        else:
            self.shared += ALPHA**2

    def repeat(self) -> None:
        self.own += ALPHA**2

    def average(self, group: int) -> None:
        """Over the copies: what they share stays, what is their own is divided."""
        self.shared += self.own / group + ALPHA**2
        self.own = 0.0

    def restart(self) -> None:
        self.shared, self.own = 1.0 + ALPHA**2, 0.0
