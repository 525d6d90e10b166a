"""Published weights: how their names and shapes map to ours, and back.

A network whose weights were published has an attribute `published` with their names. The file of
its family has `from_published`, which makes the network as published.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pipeline.core.checks import require
from pipeline.core.tensor_file import describe_mismatch

# Names of the stages of a ResNet, as in torchvision.
RESNET_STAGES = ((r"^stages\.(\d)\.", lambda match: f"layer{int(match[1]) + 1}."),)

N = TypeVar("N", bound=nn.Module)

# Tensors that no network here needs: a pattern of their published names, and the reason.
COUNTERS = {
    r"\.num_batches_tracked$": (
        "counts calls for torch's cumulative average; batch norm with a momentum never reads it"
    )
}


@dataclass(frozen=True)
class PublishedNames:
    """The published names of a network's tensors.

    Args:
        renames: substitutions (`re.sub`) that make the published name of ours, in this order.
        flat: a pattern of published names of tensors that have one dimension less than ours, whose
            last has size 1. Published are 1-D convolutions over tokens, and scalars.
        spellings: substitutions that remove what only some published names have.
        unused: published parameters that no output depends on: a pattern, and the reason.
    """

    renames: Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
    flat: str = "$^"
    spellings: Sequence[tuple[str, str]] = ()
    unused: Mapping[str, str] = field(default_factory=dict)

    def name(self, ours: str) -> str:
        """The published name of one of our tensors."""
        return _substituted(ours, self.renames)

    def is_ignored(self, published: str) -> bool:
        return any(re.search(pattern, published) for pattern in (*COUNTERS, *self.unused))


def _substituted(name: str, substitutions: Sequence[tuple[str, Any]]) -> str:
    for pattern, replacement in substitutions:
        name = re.sub(pattern, replacement, name)
    return name


@dataclass(frozen=True)
class PublishedSize:
    """A size of a network that was published for ImageNet: a row of `spiketrain models`.

    Args:
        parameters: those of the network, without published parameters that have no effect.
        top1: published accuracy in per cent, with its conditions; "-": none is known here.
        source: arXiv number.
        build: makes the network.
    """

    family: str
    size: str
    parameters: int
    top1: str
    source: str
    build: Callable[[], nn.Module]


def to_published(network: nn.Module) -> dict[str, Tensor]:
    """The weights of a network under the published names and in the published shapes.

    Raises: ValueError for a network without published names.
    """
    names = _names_of(network)
    if names is None:
        raise ValueError(
            "to_published: the network must have the form of a published one; got"
            f" {type(network).__name__} without published names"
        )
    tensors = {names.name(name): tensor for name, tensor in network.state_dict().items()}
    return {
        name: tensor.squeeze(-1) if re.search(names.flat, name) else tensor
        for name, tensor in tensors.items()
    }


def to_our_names(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Published tensors under the names, and with the dimensions, of `network`'s tensors.

    Tensors that `network` does not need are left out. Tensors that it does not know keep their
    names, as all do if `network` has no published names. Sizes are not checked.
    """
    names = _names_of(network)
    if names is None:
        return dict(tensors)
    remaining = {
        _substituted(name, names.spellings): tensor
        for name, tensor in tensors.items()
        if not names.is_ignored(name)
    }
    ours = {}
    for name, own in network.state_dict().items():
        published = names.name(name)
        if published in remaining:
            tensor = remaining.pop(published)
            is_flat = re.search(names.flat, published) and tensor.dim() + 1 == own.dim()
            ours[name] = tensor.unsqueeze(-1) if is_flat else tensor
    return ours | remaining


def load_published(published: Mapping[str, Tensor], build: Callable[[], N]) -> N:
    """The network that `build` makes, with published weights.

    Raises: ValueError for missing or unknown tensors, or tensors of another shape.
    """
    with torch.device("meta"):
        network = build()
    network.to_empty(device="cpu")
    tensors = to_our_names(published, network)
    mismatch = describe_mismatch(tensors, network.state_dict())
    require(
        not mismatch,
        f"from_published: the weights must be those of a published {type(network).__name__}; got"
        f" {mismatch}",
    )
    network.load_state_dict(tensors)
    return network


def sizes(published: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """The sizes of a published tensor.

    Raises: ValueError if it is missing or has another number of dimensions.
    """
    found = tuple(published[name].shape) if name in published else ()
    require(
        len(found) == dimensions,
        f"from_published: the tensor '{name}' must have {dimensions} dimensions; got"
        f" {found or 'none'}",
    )
    return found


def count_blocks(published: Mapping[str, Tensor], pattern: str) -> int:
    """How many different texts the first group of a pattern has at the start of the names."""
    return len({match[1] for name in published if (match := re.match(pattern, name))})


def resnet_sizes(
    published: Mapping[str, Tensor], *, first: str = "conv1", stage: str = r"layer\d"
) -> dict[str, Any]:
    """The arguments of a residual network with `published` weights.

    `first` is the name of the first convolution, and `stage` a pattern of the names of stages.
    """
    stages = sorted({match[0] for name in published if (match := re.match(stage, name))})
    width, in_channels, *_ = sizes(published, f"{first}.weight", 4)
    return {
        "blocks": [count_blocks(published, rf"{name}\.(\d+)\.") for name in stages],
        "classes": sizes(published, "fc.weight", 2)[0],
        "in_channels": in_channels,
        "width": width,
    }


def _names_of(network: nn.Module) -> PublishedNames | None:
    return getattr(network, "published", None)
