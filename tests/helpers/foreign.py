"""Networks of SpikingJelly, snnTorch and norse, and how each runs and detaches in its package."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import snntorch
import torch
from norse.torch import LIFBoxCell, LIFBoxParameters, SequentialState
from snntorch.surrogate import fast_sigmoid
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model.sew_resnet import sew_resnet18
from spikingjelly.activation_based.model.spikformer import spikformer_ti
from torch import Tensor, nn

from pipeline.models.foreign.neuron import ForeignNeuron

CLASSES = 4
NEURONS = (neuron.BaseNode, snntorch.Leaky, LIFBoxCell)


def sew() -> nn.Module:
    network = sew_resnet18(
        num_classes=CLASSES,
        cnf="ADD",
        spiking_neuron=neuron.IFNode,
        surrogate_function=surrogate.ATan(),
        detach_reset=True,
    )
    functional.set_step_mode(network, "m")
    return network


def spikformer() -> nn.Module:
    """With batch norms that let each layer fire."""
    network = spikformer_ti(img_size_h=32, img_size_w=32, num_classes=CLASSES)
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.constant_(module.weight, 3.0)
    return network


def scaled(network: Any, factor: float) -> Any:
    """With larger weights, so that each layer fires."""
    for module in network.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            module.weight.data.mul_(factor)
    return network


def tutorial() -> nn.Sequential:
    """The convolutional network of snnTorch's tutorial 6, for images of 28 pixels."""

    def leaky(**changes: Any) -> snntorch.Leaky:
        return snntorch.Leaky(0.5, spike_grad=fast_sigmoid(25), init_hidden=True, **changes)

    network = nn.Sequential(
        nn.Conv2d(1, 12, 5),
        nn.MaxPool2d(2),
        leaky(),
        nn.Conv2d(12, 64, 5),
        nn.MaxPool2d(2),
        leaky(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, CLASSES),
        leaky(output=True),
    )
    return scaled(network, 3.0)


def chain(pixels: int = 8, width: int = 12) -> SequentialState:
    """norse: a convolution and two linear layers."""

    def cell() -> LIFBoxCell:
        return LIFBoxCell(LIFBoxParameters(tau_mem_inv=torch.tensor(500.0)))

    network = SequentialState(
        nn.Conv2d(1, width, 3, padding=1),
        cell(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(width * (pixels // 2) ** 2, 4 * width),
        cell(),
        nn.Linear(4 * width, CLASSES),
    )
    return scaled(network, 5.0)


def pooled(step_mode: str = "m", *, first: nn.Module | None = None) -> nn.Sequential:
    """SpikingJelly without batch norm, with one decay. Its first layers are in a container.

    `first` is a convolution of one channel to 8 that keeps 64 pixels.
    """
    first = nn.Conv2d(1, 8, 3, padding=1) if first is None else first
    pool = nn.AvgPool2d(2) if isinstance(first, nn.Conv2d) else nn.AvgPool1d(4)
    container = layer.SeqToANNContainer if step_mode == "m" else nn.Sequential
    network = nn.Sequential(
        container(nn.Sequential(first, pool)),
        neuron.LIFNode(decay_input=False, v_reset=None, detach_reset=True),
        layer.Flatten(),
        layer.Linear(128, 32),
        neuron.LIFNode(decay_input=False, v_reset=None, detach_reset=True),
        layer.Linear(32, CLASSES),
    )
    for module in network:
        if hasattr(module, "step_mode"):
            module.step_mode = step_mode
    return scaled(network, 3.0)


def learnt_chain(pixels: int = 8) -> nn.Sequential:
    """snnTorch with a learnt beta, a parameter without dimensions."""

    def leaky() -> snntorch.Leaky:
        return snntorch.Leaky(0.5, learn_beta=True, init_hidden=True)

    network = nn.Sequential(
        nn.Flatten(), nn.Linear(pixels**2, 24), leaky(), nn.Linear(24, CLASSES), leaky()
    )
    return scaled(network, 3.0)


@dataclass(frozen=True)
class Case:
    """One network: `run` is one call of the original, from (network, x, state) to (y, state).

    `is_multi_step`: x of a call is `[T, B, ...]`, otherwise `[B, ...]`.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    is_multi_step: bool = False
    has_batch_norm: bool = False
    tolerances: tuple[float, float] = (1e-10, 1e-8)

    def __str__(self) -> str:
        return self.name

    def network(self, dtype: torch.dtype = torch.float64) -> Any:
        torch.manual_seed(0)
        network = self.build().to(dtype)
        for module in network.modules():
            if self.name == "snntorch" and isinstance(module, (nn.Conv2d, nn.Linear)):
                # snnTorch's spikes are fp32.
                module.register_forward_pre_hook(lambda layer, x: x[0].to(layer.weight.dtype))
        return network

    def input(self, *, steps: int, batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Another random image for each time step."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(steps, batch, *self.shape, generator=generator, dtype=dtype) * 2

    def call(self, network: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if self.name == "norse":
            return network(x, state)
        y = network(x)
        return (y[0] if isinstance(y, tuple) else y), None

    def original(self, network: nn.Module, x_TB: Tensor) -> Tensor:
        """The outputs `[T, B, K]` of the package, from reset neurons."""
        self.reset(network)
        if self.is_multi_step:
            return network(x_TB)
        outputs, state = [], None
        for x_B in x_TB:
            y_B, state = self.call(network, x_B, state)
            outputs.append(y_B)
        return torch.stack(outputs)

    def original_steps(self, network: nn.Module, x_TB: Tensor, loss_fn: Any) -> None:
        """The backward of each step of the package alone, with states detached between steps."""
        self.reset(network)
        state = None
        for x_B in x_TB:
            x = x_B.unsqueeze(0) if self.is_multi_step else x_B
            y, state = self.call(network, x, state)
            (loss_fn(y.squeeze(0) if self.is_multi_step else y) / len(x_TB)).backward()
            if self.name == "norse":
                state = [None if s is None else type(s)(*(v.detach() for v in s)) for s in state]
            functional.detach_net(network)
            for module in network.modules():
                if isinstance(module, snntorch.Leaky):
                    module.mem = module.mem.detach()

    def reset(self, network: nn.Module) -> None:
        functional.reset_net(network)
        for module in network.modules():
            if isinstance(module, snntorch.Leaky):
                module.reset_mem()


SEW = Case("sew_resnet18", sew, (3, 32, 32), is_multi_step=True, has_batch_norm=True)
SPIKFORMER = Case("spikformer_ti", spikformer, (3, 32, 32), is_multi_step=True, has_batch_norm=True)
TUTORIAL = Case("snntorch", tutorial, (1, 28, 28), tolerances=(1e-6, 1e-5))
CHAIN = Case("norse", chain, (1, 8, 8))
POOLED = Case("spikingjelly", pooled, (1, 8, 8), is_multi_step=True)
CASES = (SEW, SPIKFORMER, TUTORIAL, CHAIN)


def recorded_spikes(network: nn.Module) -> dict[str, list[Tensor]]:
    """Filled by each forward: the spikes of every neuron, of the package or of ours, by name."""
    spikes: dict[str, list[Tensor]] = {}

    def record(name: str, result: Any) -> None:
        spikes.setdefault(name, []).append(
            (result[0] if isinstance(result, tuple) else result).detach()
        )

    for name, module in network.named_modules():
        if isinstance(module, (*NEURONS, ForeignNeuron)):
            own = name.removeprefix("network.")
            module.register_forward_hook(lambda _, __, result, own=own: record(own, result))
    return spikes
