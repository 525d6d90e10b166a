"""QKFormer's published weights: conversion of names and shapes to and from our network.

Source: names and shapes of the module of Zhou et al. 2024 (QKFormer, arXiv 2403.16552).
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.core.tensor_file import describe_mismatch
from pipeline.models.attention import ProjectionNeuron
from pipeline.models.parts import Over
from pipeline.models.qkformer import QKFormer

# Published tensors that this network does not need, and the reason.
IGNORED = {
    "num_batches_tracked": (
        "counts calls for torch's cumulative average, which batch norm with a momentum never reads"
    )
}

_KINDS = {"synapse": "conv", "norm": "bn"}
_EMBEDDINGS = {
    ("0", "branch.0"): "proj1",
    ("0", "branch.2"): "proj2",
    ("1", "branch.0"): "proj3",
    ("1", "branch.2"): "proj4",
}


def published_name(name: str) -> str:
    """The published name of one of our tensors.

    Raises: ValueError for a tensor without one.
    """
    stage = r"stages\.(?P<stage>\d)\."
    block = stage + r"(?P<block>\d+)\."
    kind = r"(?P<kind>synapse|norm)\.(?P<tensor>\w+)$"
    if found := re.match(stage + r"0\.stem\.0\." + kind, name):
        place = "patch_embed1.proj"
    elif found := re.match(
        stage + r"0\.residual\.(?P<part>branch\.[02]|shortcut\.0)\." + kind, name
    ):
        part = (
            "proj_res"
            if found["part"] == "shortcut.0"
            else _EMBEDDINGS[min(found["stage"], "1"), found["part"]]
        )
        place = f"patch_embed{int(found['stage']) + 1}.{part}"
    elif found := re.match(
        block + r"attention\.branch\.(projections\.(?P<which>[qkv])\.currents|project)\." + kind,
        name,
    ):
        attention = "attn" if found["stage"] == "2" else "tssa"
        place = f"{_published_block(found)}.{attention}.{found['which'] or 'proj'}"
    elif found := re.match(block + r"ffn\.branch\.(?P<layer>[02])\." + kind, name):
        layer = "fc1" if found["layer"] == "0" else "fc2"
        place = f"{_published_block(found)}.mlp.{layer}"
    elif found := re.match(r"classifier\.(?P<tensor>\w+)$", name):
        return f"head.{found['tensor']}"
    else:
        raise ValueError(
            "published_name: only tensors of a QKFormer with shortcut='sew' were published; got"
            f" {name}"
        )
    return f"{place}_{_KINDS[found['kind']]}.{found['tensor']}"


def _published_block(found: re.Match[str]) -> str:
    return f"stage{int(found['stage']) + 1}.{int(found['block']) - 1}"


def from_published(
    published: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    over: Over = "time",
    projection_neuron: ProjectionNeuron = "over_time",
) -> QKFormer:
    """A QKFormer with published weights; its sizes are taken from the tensors.

    Args:
        published: tensors under their published names.
        heads: of every attention, which no tensor shows. None is one per 64 channels, as published
            for ImageNet.
        over: statistics of batch norm in training (`models/residual.py`). "time" is the published
            network. "step" is another one, which rules that run in slices need.
        projection_neuron: "over_samples" runs as the published code, with outputs that depend on
            the batch.

    Raises: ValueError for tensors that are missing, left over or of another shape.
    """
    classes, channels = _sizes(published, "head.weight", 2)
    in_channels = _sizes(published, "patch_embed1.proj_conv.weight", 4)[1]
    expansion = _sizes(published, "stage1.0.mlp.fc1_conv.weight", 4)[0] * 4 // channels
    if heads is None and channels < 64:
        raise ValueError(
            f"from_published: heads must be given for fewer than 64 channels; got {channels}"
            " channels"
        )
    depth = len({name.rsplit(".mlp.", 1)[0] for name in published if ".mlp." in name})
    with torch.device("meta"):
        network = QKFormer(
            channels=channels,
            depth=depth,
            heads=channels // 64 if heads is None else heads,
            classes=classes,
            in_channels=in_channels,
            expansion=expansion,
            over=over,
            projection_neuron=projection_neuron,
        )
    network.to_empty(device="cpu")
    tensors = renamed(published, network)
    if wrong := describe_mismatch(tensors, network.state_dict()):
        raise ValueError(
            f"from_published: the weights must be those of a published QKFormer; got {wrong}"
        )
    network.load_state_dict(tensors)
    return network


def _sizes(published: Mapping[str, Tensor], name: str, dimensions: int) -> torch.Size:
    if name not in published:
        raise ValueError(
            "from_published: the weights must be those of a published QKFormer; got none named"
            f" '{name}'"
        )
    shape = published[name].shape
    if len(shape) != dimensions:
        raise ValueError(
            f"from_published: {name} must have {dimensions} dimensions; got the shape"
            f" {tuple(shape)}"
        )
    return shape


def is_published(weights: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a published QKFormer."""
    return any(name.startswith("patch_embed1.") for name in weights)


def renamed(published: Mapping[str, Tensor], network: QKFormer) -> dict[str, Tensor]:
    """Published tensors under our names and in our shapes, also if they do not fit.

    A tensor without a place in `network` keeps its name; one of another size keeps its shape.

    Raises: ValueError for a network with a real-valued stream, for which nothing was published.
    """
    if not isinstance(network.last, nn.Identity):
        raise ValueError(
            "QKFormer: published weights are those of shortcut='sew'; got a network with a stream"
            " of real numbers"
        )
    left = {
        name: tensor for name, tensor in published.items() if name.rsplit(".", 1)[-1] not in IGNORED
    }
    ours = {}
    for name, mine in network.state_dict().items():
        theirs = published_name(name)
        if theirs in left:
            tensor = left.pop(theirs)
            ours[name] = (
                tensor.reshape(mine.shape)
                if tensor.shape == _published_shape(theirs, mine)
                else tensor
            )
    return ours | left


def to_published(network: QKFormer) -> dict[str, Tensor]:
    """Our weights under the published names and in the published shapes, without call counters."""
    named = {published_name(name): tensor for name, tensor in network.state_dict().items()}
    return {
        theirs: tensor.reshape(_published_shape(theirs, tensor)) for theirs, tensor in named.items()
    }


def _published_shape(theirs: str, tensor: Tensor) -> torch.Size:
    """The published shape: synapses of an attention were 1-D convolutions over tokens."""
    is_1d = re.search(r"\.(tssa|attn)\.\w+_conv\.weight$", theirs) is not None
    return tensor.shape[:-1] if is_1d else tensor.shape
