"""Networks that SpikingJelly and we both have, with equal weights, for `benchmarks/peer.py`.

Their arithmetic is equal in training if batch norm takes its statistics over the same steps.
"""

# T time, B batch, C channels, H W pixels, K classes

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet as sew_resnet_of_peer
from spikingjelly.activation_based.model.qkformer import QKFormer, qkformer_10_384
from torch import Tensor, nn

from pipeline.models.parts import StatisticsOver
from pipeline.models.qkformer import qkformer_10
from pipeline.models.sew_resnet import sew_resnet
from pipeline.train.transfer import move_network

T = 4


class Network(NamedTuple):
    title: str
    theirs: Callable[[], nn.Module]  # [T, B, C, H, W] to [T, B, K], or to its mean [B, K]
    ours: Callable[..., nn.Module]
    images_on_gpu: tuple[int, ...]


def sew(depth: Any) -> Network:
    theirs = partial(
        getattr(sew_resnet_of_peer, f"sew_resnet{depth}"),
        pretrained=False,
        cnf="ADD",
        spiking_neuron=neuron.IFNode,
        surrogate_function=surrogate.ATan(),
        detach_reset=True,
    )
    return Network(f"SEW-ResNet-{depth}", theirs, partial(sew_resnet, depth), (32, 128))


NETWORKS = {
    "sew18": sew(18),
    "sew34": sew(34),
    "qkformer": Network(
        "QKFormer-10-384",
        partial(qkformer_10_384, T=T, detach_reset=True, surrogate_function=surrogate.Sigmoid(4.0)),
        qkformer_10,
        (8, 32),
    ),
}


def theirs_of(network: Network) -> nn.Module:
    peer = without_biases(network.theirs())
    functional.set_step_mode(peer, "m")
    return peer


def without_biases(network: nn.Module) -> nn.Module:
    """Remove the biases of convolutions. In a QKFormer some have one in SpikingJelly only, others
    here only; a batch norm follows each and subtracts it.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            module.bias = None
    return network


def rows_of(peer: Any) -> Iterator[tuple[nn.Parameter, slice]]:
    """For each of our parameters, in order: theirs, and its rows."""
    modules: list[tuple[Any, int]] = [(peer, 1)]  # with the number of our modules in each
    if isinstance(peer, QKFormer):
        modules.clear()
        for stage in "123":
            modules.append((getattr(peer, f"patch_embed{stage}"), 1))
            for block in getattr(peer, f"stage{stage}"):
                # q, k and v are one convolution with one norm; ours have one each.
                joint = next(block.attn.children())
                modules.append((joint, joint[0].out_channels // joint[0].in_channels))
                modules += [(block.attn.proj_conv_bn, 1), (block.mlp, 1)]
        modules.append((peer.head, 1))
    for module, parts in modules:
        for part in range(parts):
            for weight in module.parameters():
                size = len(weight) // parts
                yield weight, slice(part * size, (part + 1) * size)


def ours_of(network: Network, over: StatisticsOver, peer: nn.Module) -> nn.Module:
    """Our network with the weights of `peer`."""
    own = without_biases(network.ours(over=over)).to(next(peer.parameters()))
    with torch.no_grad():
        for weight, (its, rows) in zip(own.parameters(), rows_of(peer), strict=True):
            weight.copy_(its[rows].view_as(weight))
    return move_network(own, next(peer.parameters()).device)


def gradient_difference(own: nn.Module, peer: nn.Module) -> float:
    """The largest difference of a parameter's gradients, as a share of its largest gradient."""
    shares: list[Tensor] = []
    for weight, (its, rows) in zip(own.parameters(), rows_of(peer), strict=True):
        assert weight.grad is not None and its.grad is not None
        other = its.grad[rows].view_as(weight)
        shares.append((weight.grad - other).abs().max() / other.abs().max())
    return float(torch.stack(shares).max())  # NaN if a gradient is 0 or not a number
