"""QKFormer: a spiking Transformer with three stages, at 1/4, 1/8 and 1/16 of the image, rounded up.

    stage 1:   embed to D/4, 1 block with TokenQK
    stage 2:   embed to D/2, 2 blocks with TokenQK
    stage 3:   embed to D, all other blocks with SelfAttention
    head:      mean over tokens, linear classifier
    block:     x <- x + attention(x),   x <- x + ffn(x),   ffn of two 1x1 synapses, D to 4 D to D
    embed:     (synapse, norm, max pool, neuron, synapse, norm, neuron)
               + (1x1 synapse of stride 2, norm, neuron)

This is the published form, `shortcut="sew"`, whose stream holds whole numbers. With "membrane",
"multiple" and "multiple_all" the stream is real-valued (`models/residual.py`). Then neurons stand
before synapses, also in the embeddings, and one before the classifier. A block starts as the
identity, as in MS-ResNet (except under "multiple_all", where a of its attention is added).

The drop-path share grows linearly with depth to `drop_path`, with one share for both branches of a
block. The published code declares drop path but never applies it, so 0 is as published.

`from_published` and `to_published` convert names and shapes of the published weights.

Source: Zhou et al. 2024 (QKFormer, arXiv 2403.16552), also for the names and shapes of the weights.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts, refuse_unless_one_of, require
from pipeline.core.tensor_file import describe_mismatch
from pipeline.models.attention import Attention, ProjectionNeuron, SelfAttention, TokenQK
from pipeline.models.parts import Over, Pool
from pipeline.models.residual import BlockFactory, Layer, Norm, Shortcut, named
from pipeline.spiking.neuron import LIF
from pipeline.spiking.slice_cache import StaticInput
from pipeline.spiking.surrogate import Sigmoid
from pipeline.spiking.synapse import Linear

# T time, B batch, C channels, H W pixels, K classes


# SpikingJelly's LIF at tau 2, as in the published code; for normaliser-free networks without input
# scaling, which would shrink their currents.
NEURON = LIF(0.5, reset="zero", scale_input=True, surrogate=Sigmoid(4.0))
SWS_NEURON = LIF(0.5, surrogate=Sigmoid(4.0))


class QKFormer(nn.Module):
    """`[T, B, C, H, W]` to `[T, B, K]`, for images of any size.

    16 pixels a side, after shrinking, leave one token in the last stage.

    Args:
        channels: D, the channels of the last stage; a multiple of 4 heads.
        depth: the total number of blocks. The first stages have 1 and 2 of them.
        heads: heads of every attention.
        expansion: the factor by which the FFN widens the channels.
        drop_path: the share at the last block.
        shrink: images are first averaged over squares of this many pixels a side, so that a small
            student sees less detail than its teacher. Rows and columns at the right and the bottom
            that fill no square are ignored.
        projection_neuron: the neuron of the last stage's attentions (`models/attention.py`).
            "over_samples" is the published code's, and published accuracies need it; an output
            then depends on its batch.
        neuron: None: the published LIF (decay 0.5, scaled input, reset to zero), or under "sws" a
            LIF with reset by subtraction and without scaled input.

    Raises: ValueError for sizes below 1, or choices that do not fit together
    (`models/residual.py`); in `forward` for images smaller than one square.
    """

    def __init__(
        self,
        *,
        channels: int,
        depth: int,
        heads: int,
        classes: int,
        in_channels: int = 3,
        expansion: int = 4,
        shortcut: Shortcut = "sew",
        norm: Norm = "batch",
        over: Over = "step",
        drop_path: float = 0.0,
        shrink: int = 1,
        projection_neuron: ProjectionNeuron = "over_time",
        neuron: nn.Module | None = None,
    ) -> None:
        super().__init__()
        numbers = {
            "classes": classes,
            "in_channels": in_channels,
            "expansion": expansion,
            "heads": heads,
            "channels": channels,
            "shrink": shrink,
        }
        refuse_unless_counts("QKFormer", numbers)
        self.shrink = shrink
        _check_sizes(channels, heads, depth)
        require(
            shortcut != "post_activation",
            "QKFormer: shortcut must not be 'post_activation', which has no published form for"
            " attention",
        )
        if neuron is None:
            neuron = SWS_NEURON if norm == "sws" else NEURON
        blocks = BlockFactory(shortcut=shortcut, neuron=neuron, norm=norm, over=over)
        shares = iter(drop_path * index / (depth - 1) for index in range(depth))
        self.stages = nn.Sequential()
        for wide, count, attention in (
            (channels // 4, 1, TokenQK),
            (channels // 2, 2, TokenQK),
            (channels, depth - 3, partial(SelfAttention, projection_neuron=projection_neuron)),
        ):
            stem = None if self.stages else _stem(blocks, in_channels, wide // 2, shrink=shrink)
            stage = nn.Sequential(Embed(blocks, wide // 2, wide, stem=stem))
            build = partial(Block, attention=attention, heads=heads, expansion=expansion)
            stage.extend(build(blocks, wide, drop_path=next(shares)) for _ in range(count))
            self.stages.append(stage)
        self.last = nn.Identity() if blocks.carries_spikes else blocks.stream_spikes()
        self.classifier = Linear(channels, classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        height, width = x_TBCHW.shape[3:]
        if min(height, width) < self.shrink:
            raise ValueError(
                f"QKFormer: images must have shrink={self.shrink} pixels a side or more; got"
                f" {height} x {width}"
            )
        return self.classifier(self.last(self.stages(x_TBCHW)).mean((3, 4)))


def _check_sizes(channels: int, heads: int, depth: int) -> None:
    require(
        not channels % (4 * heads),
        f"QKFormer: channels must be a multiple of 4 heads; got channels={channels}, heads={heads}",
    )
    require(
        depth >= 4,
        "QKFormer: depth must be >= 4, one block for the first stage and two for the"
        f" second; got {depth=}",
    )


class Embed(nn.Module):
    """Halves the image and changes the channels.

    The first one has a stem and quarters the image.
    """

    def __init__(
        self, blocks: BlockFactory, in_channels: int, channels: int, *, stem: nn.Sequential | None
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential() if stem is None else stem
        layers = [Layer(in_channels, channels, 3, pools=True), Layer(channels, channels, 3)]
        self.residual = blocks.one_residual(layers, shortcut_of="first")

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return self.residual(self.stem(x_TBCHW))


def _stem(blocks: BlockFactory, in_channels: int, channels: int, *, shrink: int) -> nn.Sequential:
    layers = dict(blocks.currents(Layer(in_channels, channels, 3, pools=True)).named_children())
    if shrink > 1:
        layers = {"shrink": Pool(nn.AvgPool2d(shrink)), **layers}
    first = StaticInput.of(named(**layers))
    return nn.Sequential(first, blocks.neuron()) if blocks.carries_spikes else nn.Sequential(first)


class Block(nn.Module):
    """Attention and FFN, each with its shortcut."""

    def __init__(
        self,
        blocks: BlockFactory,
        channels: int,
        *,
        attention: Callable[..., Attention],
        heads: int,
        expansion: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.attention = blocks.wrap(attention(blocks, channels, heads=heads), drop_path=drop_path)
        wide = channels * expansion
        layers = [Layer(channels, wide, bias=True), Layer(wide, channels, bias=True)]
        self.ffn = blocks.residual(layers, last_gain=blocks.branch_gain, drop_path=drop_path)
        self.ffn.part = "ffn"  # type: ignore[assignment]  # read by models/transforms.py

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return self.ffn(self.attention(x_TBCHW))


def qkformer_10(
    channels: Literal[384, 512, 768] = 384,
    *,
    classes: int = 1000,
    in_channels: int = 3,
    shortcut: Shortcut = "sew",
    norm: Norm = "batch",
    over: Over = "step",
    drop_path: float = 0.0,
    projection_neuron: ProjectionNeuron = "over_time",
    neuron: nn.Module | None = None,
) -> QKFormer:
    """QKFormer-10-384, -512 or -768: 16.47, 29.08 or 64.96 M parameters at 1000 classes."""
    refuse_unless_one_of("qkformer_10", (384, 512, 768), channels=channels)
    return QKFormer(
        channels=channels,
        depth=10,
        heads=channels // 64,
        classes=classes,
        in_channels=in_channels,
        shortcut=shortcut,
        norm=norm,
        over=over,
        drop_path=drop_path,
        projection_neuron=projection_neuron,
        neuron=neuron,
    )


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
    if match := re.match(stage + r"0\.stem\.0\." + kind, name):
        place = "patch_embed1.proj"
    elif match := re.match(
        stage + r"0\.residual\.(?P<part>branch\.[02]|shortcut\.0)\." + kind, name
    ):
        part = (
            "proj_res"
            if match["part"] == "shortcut.0"
            else _EMBEDDINGS[min(match["stage"], "1"), match["part"]]
        )
        place = f"patch_embed{int(match['stage']) + 1}.{part}"
    elif match := re.match(
        block + r"attention\.branch\.(projections\.(?P<which>[qkv])\.currents|project)\." + kind,
        name,
    ):
        attention = "attn" if match["stage"] == "2" else "tssa"
        place = f"{_published_block(match)}.{attention}.{match['which'] or 'proj'}"
    elif match := re.match(block + r"ffn\.branch\.(?P<layer>[02])\." + kind, name):
        layer = "fc1" if match["layer"] == "0" else "fc2"
        place = f"{_published_block(match)}.mlp.{layer}"
    elif match := re.match(r"classifier\.(?P<tensor>\w+)$", name):
        return f"head.{match['tensor']}"
    else:
        raise ValueError(
            "published_name: only tensors of a QKFormer with shortcut='sew' were published; got"
            f" {name}"
        )
    return f"{place}_{_KINDS[match['kind']]}.{match['tensor']}"


def _published_block(match: re.Match[str]) -> str:
    return f"stage{int(match['stage']) + 1}.{int(match['block']) - 1}"


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
        heads: heads of every attention, which no tensor shows. None: one per 64 channels, as
            published for ImageNet.
        over: statistics of batch norm in training (`models/residual.py`). "time" is the published
            network. "step" is another one, which rules that run in slices need.
        projection_neuron: "over_samples" runs as the published code, with outputs that depend on
            the batch.

    Raises: ValueError for tensors that are missing, left over or of another shape.
    """
    classes, channels = _sizes(published, "head.weight", 2)
    in_channels = _sizes(published, "patch_embed1.proj_conv.weight", 4)[1]
    expansion = _sizes(published, "stage1.0.mlp.fc1_conv.weight", 4)[0] * 4 // channels
    require(
        heads is not None or channels >= 64,
        f"from_published: heads must be given for fewer than 64 channels; got {channels} channels",
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
    require(
        name in published,
        "from_published: the weights must be those of a published QKFormer; got none named"
        f" '{name}'",
    )
    shape = published[name].shape
    require(
        len(shape) == dimensions,
        f"from_published: {name} must have {dimensions} dimensions; got the shape {tuple(shape)}",
    )
    return shape


def is_published(weights: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a published QKFormer."""
    return any(name.startswith("patch_embed1.") for name in weights)


def renamed(published: Mapping[str, Tensor], network: QKFormer) -> dict[str, Tensor]:
    """Published tensors under our names and in our shapes, even if they do not fit.

    A tensor without a place in `network` keeps its name; one of another size keeps its shape.

    Raises: ValueError for a network with a real-valued stream, for which nothing was published.
    """
    require(
        isinstance(network.last, nn.Identity),
        "QKFormer: published weights are those of shortcut='sew'; got a network with a stream"
        " of real numbers",
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
