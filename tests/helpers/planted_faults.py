"""Networks with one planted fault each, and sound ones, for `pipeline.check`.

They were written without a look at the check.
"""

# T time, B batch, C channels, N pixels of an image in a row

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.convnet import convnet
from pipeline.models.ms_resnet import MSResNet
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.models.qkformer import QKFormer
from pipeline.models.sew_resnet import SEWResNet
from pipeline.models.vgg import vgg_sws, vgg_sws_f
from pipeline.spiking.neuron import IF, LIF, PLIF
from pipeline.spiking.surrogate import Sigmoid
from pipeline.spiking.synapse import Linear

FEATURES, HIDDEN, CLASSES, T, B = 12, 24, 5, 5, 6


class Planted(NamedTuple):
    """A network `[T, B, 12]` to `[T, B, 5]`, and the module at fault."""

    build: Callable[[], nn.Module]
    module: str


def chain(**inserted: nn.Module) -> nn.Sequential:
    """Two layers with neurons and a classifier. An inserted module stands before the second layer,
    or in the place of the module with its name.
    """
    parts: dict[str, nn.Module] = {
        "first": Linear(FEATURES, HIDDEN),
        "neuron": LIF(0.6, surrogate=Sigmoid(4.0)),
        "second": Linear(HIDDEN, HIDDEN),
        "last": LIF(0.6, surrogate=Sigmoid(4.0)),
        "classifier": Linear(HIDDEN, CLASSES),
    }
    with torch.no_grad():
        for name in ("first", "second"):  # so that neurons fire now and then
            layer: Any = parts[name]
            layer.weight.mul_(3)
    before = [name for name in inserted if name not in parts]
    parts |= {name: module for name, module in inserted.items() if name in parts}
    names = ["first", "neuron", *before, "second", "last", "classifier"]
    return nn.Sequential(OrderedDict((name, (parts | inserted)[name]) for name in names))


class FromSampleToSample(nn.Module):
    """Gives its neuron time steps and samples as one axis of time."""

    def __init__(self) -> None:
        super().__init__()
        self.neuron = LIF(0.6)

    def forward(self, x_TBC: Tensor) -> Tensor:
        steps = len(x_TBC)
        row_NC = 0.7 * x_TBC.flatten(0, 1)  # a whole spike would fire it at once
        return self.neuron(row_NC.unsqueeze(1)).squeeze(1).unflatten(0, (steps, -1))


class OverSamples(nn.Module):
    def forward(self, x_TBC: Tensor) -> Tensor:
        return x_TBC.softmax(1) * x_TBC.shape[1]


class OfTheBatch(nn.Module):
    """Batch norm that takes the statistics of the batch in evaluation, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN, track_running_stats=False)

    def forward(self, x_TBC: Tensor) -> Tensor:
        return torch.stack([self.norm(x_BC) for x_BC in x_TBC])


class KeptForever(nn.Module):
    """A leaky sum of its inputs that starts where the last batch has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.sum: Tensor | float = 0.0

    def forward(self, x_TBC: Tensor) -> Tensor:
        sums = []
        for x_BC in x_TBC:
            self.sum = 0.5 * self.sum + x_BC
            sums.append(self.sum)
        self.sum = sums[-1].detach()
        return torch.stack(sums)


class FirstBatchCached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offset: Tensor | None = None

    def forward(self, x_TBC: Tensor) -> Tensor:
        if self.offset is None:
            self.offset = x_TBC.detach().mean((0, 1))
        return x_TBC - self.offset


class OverTime(nn.Module):
    """Subtracts the mean of the steps of a call."""

    def forward(self, x_TBC: Tensor) -> Tensor:
        return x_TBC - x_TBC.mean(0)


class Delayed(nn.Module):
    """The input of one step before; a call forgets that of the call before."""

    def forward(self, x_TBC: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x_TBC[:1]), x_TBC[:-1]])


class OneStepNeuron(nn.Module):
    """A neuron that takes all steps for one."""

    def __init__(self) -> None:
        super().__init__()
        self.neuron = LIF(0.6)

    def forward(self, x_TBC: Tensor) -> Tensor:
        return self.neuron(0.7 * x_TBC.unsqueeze(0)).squeeze(0)


class Forgetful(LIF):
    """A neuron whose membrane has no gradient over time."""

    def step(self, x_B: Tensor, v_B: Tensor) -> tuple[Tensor, Tensor]:
        return super().step(x_B, v_B.detach())


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return 2 * grad_outputs[0]


class TwiceTheGradient(nn.Module):
    def forward(self, x_TBC: Tensor) -> Tensor:
        return _Doubled.apply(x_TBC)  # type: ignore[return-value]


class WithDetachedBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = Linear(HIDDEN, HIDDEN)

    def forward(self, x_TBC: Tensor) -> Tensor:
        return x_TBC + self.branch(x_TBC).detach()


class AlwaysDropping(nn.Module):
    def forward(self, x_TBC: Tensor) -> Tensor:
        return F.dropout(x_TBC, 0.3, training=True)


class StaleNorm(nn.Module):
    """Batch norm of single steps, whose running statistics are those of other data."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN, momentum=0.0)
        assert self.norm.running_mean is not None
        self.norm.running_mean.fill_(5.0)

    def forward(self, x_TBC: Tensor) -> Tensor:
        return torch.stack([self.norm(x_BC) for x_BC in x_TBC])


FAULTS = {
    "a neuron runs from sample to sample": Planted(
        lambda: chain(mixer=FromSampleToSample()), "mixer.neuron"
    ),
    "softmax over samples": Planted(lambda: chain(attention=OverSamples()), "attention"),
    "statistics of the batch in evaluation": Planted(lambda: chain(norm=OfTheBatch()), "norm.norm"),
    "state outlives a batch": Planted(lambda: chain(trace=KeptForever()), "trace"),
    "the first batch is cached": Planted(lambda: chain(offset=FirstBatchCached()), "offset"),
    "a mean over the steps of a call": Planted(lambda: chain(centred=OverTime()), "centred"),
    "a delay without state": Planted(lambda: chain(delay=Delayed()), "delay"),
    "all steps as one": Planted(lambda: chain(odd=OneStepNeuron()), "odd"),
    "no gradient over time": Planted(lambda: chain(last=Forgetful(0.6)), "last"),
    "twice the gradient": Planted(lambda: chain(scaled=TwiceTheGradient()), "scaled"),
    "a branch without gradient": Planted(
        lambda: chain(residual=WithDetachedBranch()), "residual.branch"
    ),
    "a neuron that never fires": Planted(lambda: chain(last=LIF(0.6, threshold=1e4)), "last"),
    "a neuron that always fires": Planted(
        lambda: chain(second=_with_bias(50.0), last=LIF(0.0, reset="zero")), "last"
    ),
    "dropout in evaluation": Planted(lambda: chain(noise=AlwaysDropping()), "noise"),
    "running statistics of other data": Planted(lambda: chain(norm=StaleNorm()), "norm.norm"),
}
# The attention of QKFormer as it was published, on images.
PUBLISHED_QKFORMER = Planted(
    lambda: QKFormer(
        channels=32,
        depth=4,
        heads=4,
        classes=CLASSES,
        in_channels=3,
        projection_neuron="over_samples",
    ),
    "stages.2.1.attention.branch.last",
)


def _with_bias(bias: float) -> Linear:
    layer = Linear(HIDDEN, HIDDEN)
    nn.init.constant_(layer.bias, bias)
    return layer


def drawn() -> Tensor:
    """An input for the networks with a fault, `[T, B, 12]`."""
    return torch.randn(T, B, FEATURES)


def _mlp() -> nn.Module:
    return nn.Sequential(
        Linear(FEATURES, HIDDEN),
        PLIF(0.4),
        Linear(HIDDEN, HIDDEN, bias=False, weights="standardized"),
        IF(reset="zero", reset_gradient="kept"),
        nn.Dropout(0.2),
        Linear(HIDDEN, CLASSES),
    )


def images() -> Tensor:
    return torch.randn(3, 4, 3, 32, 32)


# Each with an input of its own.
SOUND: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "MLP with PLIF, IF and dropout": (_mlp, drawn),
    "VGG": (lambda: vgg_sws(CLASSES, stages=((8,), (8, 16))), images),
    "VGG with feedback": (lambda: vgg_sws_f(CLASSES, stages=((8,), (16,))), images),
    "NF-ResNet": (lambda: nf_resnet18_small(CLASSES, width=8, blocks=(1, 1)), images),
    "convolutions with batch norm over time": (
        lambda: convnet(CLASSES, stages=((8,), (8,)), over="time"),
        images,
    ),
    "SEW-ResNet": (
        lambda: SEWResNet(
            blocks=(1, 1), bottleneck=False, classes=CLASSES, in_channels=3, width=8, over="step"
        ),
        images,
    ),
    "MS-ResNet": (
        lambda: MSResNet(blocks=(1, 1), classes=CLASSES, in_channels=3, width=8, over="step"),
        images,
    ),
    "QKFormer": (
        lambda: QKFormer(channels=32, depth=4, heads=4, classes=CLASSES, in_channels=3),
        images,
    ),
}
