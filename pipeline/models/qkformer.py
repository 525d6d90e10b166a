"""QKFormer: a spiking Transformer with three stages, at 1/4, 1/8 and 1/16 of the image, rounded up.

    stage 1:   stem, embed to D/4, 1 block with TokenQK
    stage 2:   embed to D/2, 2 blocks with TokenQK
    stage 3:   embed to D, all other blocks with SelfAttention
    head:      mean over tokens, linear classifier
    block:     x <- x + attention(x),   x <- x + ffn(x),   ffn of two 1x1 synapses, D to 4 D to D
    stem:      synapse to D/8, norm, max pool, neuron
    embed:     (synapse, norm, max pool, neuron, synapse, norm, neuron)
               + (1x1 synapse of stride 2, norm, neuron)

This is the published form, `shortcut="sew"`, whose stream consists of whole numbers. With
"membrane", "multiple" and "multiple_all" the stream is real-valued (`models/residual.py`). A neuron
then precedes each synapse but the first, also in the embeddings and before the classifier. A block
starts as the identity, as in MS-ResNet (except under "multiple_all", where its attention adds a).

Neither kind of attention has a softmax. q, k and v are the spikes behind 1x1 synapses that read the
stream. These spikes are split into heads of d channels. The tokens are the N pixels.

    TokenQK         a[n] = L'(sum_d q[d, n]) k[ . , n],       y = S a
                    a mask over tokens: O(N C)
    SelfAttention   a[n] = SCALE sum_m (q[n] . k[m]) v[m],    y = S L'(a)
                    computed as (sum_m v[m] k[m]^T) q[n]: O(N C d)

L' is a neuron of threshold 0.5, and S the last synapse with its norm. On a real-valued stream one
neuron precedes q, k and v, and none follows S. Under "multiple_all" each projection has its own
shortcut: the stream is added to the currents of q, k and v, and a is added to y. (In SelfAttention
a is the input of L'. TokenQK has no neuron before S, so its a consists of spikes.)

With `projection_neuron="over_samples"` the neuron after SelfAttention's S runs as in the published
code (see `OverSamples`). Published accuracies were measured with this neuron.

The drop-path share grows linearly with depth to `drop_path`. Both branches of a block have the same
share. The published code declares drop path but never applies it, so 0 is as published.

`from_published` and `to_published` convert names and shapes of the published weights.

Source: Zhou et al. 2024 (QKFormer, arXiv 2403.16552), also for the names and shapes of the weights;
Zhou et al. 2023 (Spikformer, arXiv 2209.15425); the shortcuts of an attention: Le & Li 2023
(BinaryViT, arXiv 2306.16678).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts, refuse_unless_one_of, require
from pipeline.core.tensor_file import describe_mismatch
from pipeline.models.parts import Pool, StatisticsOver
from pipeline.models.residual import BlockFactory, Layer, Norm, Shortcut, named_sequential
from pipeline.spiking.kernels.operators import like_steps
from pipeline.spiking.neuron import LIF
from pipeline.spiking.slice_cache import StaticInput
from pipeline.spiking.surrogate import Sigmoid
from pipeline.spiking.synapse import Linear

# T time, B batch, C channels, H W pixels, K classes; h heads, d channels of a head, N tokens


ATTENTION_THRESHOLD = 0.5
SCALE = 0.125

# The neuron after a SelfAttention has a membrane per sample, or one membrane for all samples.
ProjectionNeuron = Literal["over_time", "over_samples"]

# SpikingJelly's LIF at tau 2, as in the published code. Normaliser-free networks have no input
# scaling, because it would shrink their currents.
NEURON = LIF(0.5, reset="zero", scale_input=True, surrogate=Sigmoid(4.0))
SWS_NEURON = LIF(0.5, surrogate=Sigmoid(4.0))


class QKFormer(nn.Module):
    """`[T, B, C, H, W]` to `[T, B, K]`, for images of any size.

    After shrinking, each square of 16 by 16 pixels gives one token in the last stage.

    Args:
        channels: D, the channels of the last stage; a multiple of 4 * `heads`.
        depth: the total number of blocks. The first stage has 1 of them, the second has 2.
        heads: heads of every attention.
        expansion: the factor by which the FFN widens the channels.
        drop_path: the share at the last block.
        shrink: images are first averaged over squares of this many pixels a side, so that a small
            student sees less detail than its teacher. Remaining rows and columns at the right and
            the bottom are ignored.
        projection_neuron: the neuron after S in the last stage. "over_samples" is as in the
            published code and necessary for published accuracies. An output then depends on its
            batch.
        neuron: None: the published LIF (decay 0.5, scaled input, reset to zero), or under "sws" a
            LIF with reset by subtraction and without scaled input.

    Raises: ValueError for sizes below 1, channels that are not a multiple of 4 * `heads`, a depth
    below 4, or choices that do not fit together; in `forward` for a side below `shrink` pixels.
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
        over: StatisticsOver = "step",
        drop_path: float = 0.0,
        shrink: int = 1,
        projection_neuron: ProjectionNeuron = "over_time",
        neuron: nn.Module | None = None,
    ) -> None:
        super().__init__()
        _check(
            classes=classes,
            in_channels=in_channels,
            expansion=expansion,
            heads=heads,
            channels=channels,
            shrink=shrink,
            depth=depth,
            shortcut=shortcut,
        )
        if neuron is None:
            neuron = SWS_NEURON if norm == "sws" else NEURON
        self.shrink = shrink
        blocks = BlockFactory(shortcut=shortcut, neuron=neuron, norm=norm, over=over)
        shares = iter(drop_path * index / (depth - 1) for index in range(depth))
        self.stages = nn.Sequential()
        for width, count, attention in (
            (channels // 4, 1, TokenQK),
            (channels // 2, 2, TokenQK),
            (channels, depth - 3, partial(SelfAttention, projection_neuron=projection_neuron)),
        ):
            stem = nn.Sequential()
            if not self.stages:
                stem = _stem(blocks, in_channels, width // 2, shrink=shrink)
            layers = [Layer(width // 2, width, 3, pools=True), Layer(width, width, 3)]
            residual = blocks.one_residual(layers, shortcut_of="first")
            stage = nn.Sequential(named_sequential(stem=stem, residual=residual))
            build_attention = partial(attention, blocks, width, heads=heads)
            for share in islice(shares, count):
                stage.append(
                    block(blocks, width, build_attention, expansion=expansion, drop_path=share)
                )
            self.stages.append(stage)
        self.last = nn.Identity() if blocks.carries_spikes else blocks.stream_neuron()
        self.classifier = Linear(channels, classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        if min(x_TBCHW.shape[3:]) < self.shrink:
            raise ValueError(
                f"QKFormer: an image must have at least shrink={self.shrink} pixels a side; got"
                f" {tuple(x_TBCHW.shape[3:])}"
            )
        return self.classifier(self.last(self.stages(x_TBCHW)).mean((3, 4)))


def _check(*, depth: int, shortcut: Shortcut, channels: int, heads: int, **counts: int) -> None:
    refuse_unless_counts("QKFormer", counts | {"heads": heads, "channels": channels})
    require(
        channels % (4 * heads) == 0,
        f"QKFormer: channels must be a multiple of 4 * heads; got {channels=}, {heads=}",
    )
    require(
        depth >= 4,
        "QKFormer: depth must be >= 4, one block for the first stage and two for the second; got"
        f" {depth=}",
    )
    require(
        shortcut != "post_activation",
        "QKFormer: shortcut must not be 'post_activation', which has no published form for"
        " attention",
    )


def _stem(blocks: BlockFactory, in_channels: int, channels: int, *, shrink: int) -> nn.Sequential:
    layers = dict(
        blocks.normed_synapse(Layer(in_channels, channels, 3, pools=True)).named_children()
    )
    if shrink > 1:
        layers = {"shrink": Pool(nn.AvgPool2d(shrink)), **layers}
    first = StaticInput.of(named_sequential(**layers))
    return nn.Sequential(first, blocks.neuron()) if blocks.carries_spikes else nn.Sequential(first)


def block(
    blocks: BlockFactory,
    channels: int,
    attention: Callable[[], "Attention"],
    *,
    expansion: int,
    drop_path: float,
) -> nn.Sequential:
    """Attention and FFN, each with its shortcut."""
    wrapped_attention = blocks.wrap(attention(), drop_path=drop_path)
    hidden = channels * expansion
    layers = [Layer(channels, hidden, bias=True), Layer(hidden, channels, bias=True)]
    ffn = blocks.residual(layers, last_gain=blocks.branch_gain, drop_path=drop_path)
    ffn.part = "ffn"  # type: ignore[assignment]  # read by models/transforms.py
    return named_sequential(attention=wrapped_attention, ffn=ffn)


class Projection(nn.Module):
    """Spikes of q, k or v: neuron(norm(synapse(h))), or neuron(norm(synapse(h)) + x)."""

    def __init__(self, blocks: BlockFactory, channels: int) -> None:
        super().__init__()
        self.currents = blocks.normed_synapse(Layer(channels, channels))
        self.neuron = blocks.neuron()

    def forward(self, h_TBCHW: Tensor, x_TBCHW: Tensor | None) -> Tensor:
        currents = self.currents(h_TBCHW)
        return self.neuron(currents if x_TBCHW is None else currents + x_TBCHW)


class Attention(nn.Module):
    """Base class of both attentions; `_mix` combines tokens. The output has the input's shape."""

    def __init__(
        self,
        blocks: BlockFactory,
        channels: int,
        *,
        heads: int,
        projections: tuple[str, ...] = ("q", "k"),
    ) -> None:
        super().__init__()
        self.heads = heads
        self.has_shortcuts = blocks.shortcut == "multiple_all"
        self.first = nn.Identity() if blocks.carries_spikes else blocks.stream_neuron()
        self.projections = nn.ModuleDict(
            {name: Projection(blocks, channels) for name in projections}
        )
        self.attention_neuron = blocks.branch_neuron(threshold=ATTENTION_THRESHOLD)
        self.project = blocks.normed_synapse(
            Layer(channels, channels, bias=True), gain=blocks.branch_gain
        )
        self.last = blocks.neuron() if blocks.carries_spikes else nn.Identity()

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        h = self.first(x_TBCHW)
        stream = x_TBCHW if self.has_shortcuts else None
        a, s = self._mix(*(projection(h, stream) for projection in self.projections.values()))
        y = self.project(s)
        return self.last(y + a if self.has_shortcuts else y)

    def _mix(self, *projected_TBCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Map the spikes q, k (and v) to a, and to the spikes that S reads."""
        raise NotImplementedError(f"{type(self).__name__} must override _mix")

    def _in_heads(self, projected_TBCHW: Sequence[Tensor]) -> Iterator[Tensor]:
        """Views `[T, B, h, d, N]`."""
        return (each.flatten(3).unflatten(2, (self.heads, -1)) for each in projected_TBCHW)


class TokenQK(Attention):
    """A mask over the tokens of k, computed from q."""

    def _mix(self, *projected_TBCHW: Tensor) -> tuple[Tensor, Tensor]:
        q_TBhdN, k_TBhdN = self._in_heads(projected_TBCHW)
        # k comes first, because the product has the memory order of its first factor.
        a_TBhdN = k_TBhdN * self.attention_neuron(q_TBhdN.sum(3, keepdim=True))
        a_TBCHW = a_TBhdN.reshape(projected_TBCHW[0].shape)
        return a_TBCHW, a_TBCHW


class SelfAttention(Attention):
    """Attention between all tokens, at a cost linear in their number.

    Raises: ValueError for an unknown `projection_neuron`, or for "over_samples" if the neuron after
    S is missing or is not a plain LIF.
    """

    def __init__(
        self,
        blocks: BlockFactory,
        channels: int,
        *,
        heads: int,
        projection_neuron: ProjectionNeuron = "over_time",
    ) -> None:
        super().__init__(blocks, channels, heads=heads, projections=("q", "k", "v"))
        refuse_unless_one_of(
            "SelfAttention", ("over_time", "over_samples"), projection_neuron=projection_neuron
        )
        if projection_neuron == "over_samples":
            require(
                blocks.carries_spikes,
                "SelfAttention: projection_neuron='over_samples' needs a neuron after the"
                f" attention, as with shortcut='sew'; got shortcut={blocks.shortcut!r}",
            )
            self.last = OverSamples.of(self.last)

    def _mix(self, *projected_TBCHW: Tensor) -> tuple[Tensor, Tensor]:
        q_TBhdN, k_TBhdN, v_TBhdN = self._in_heads(projected_TBCHW)
        a_TBhdN = v_TBhdN @ k_TBhdN.transpose(-1, -2) @ q_TBhdN * SCALE
        # A matrix product is contiguous, also if the channels of its factors are last in memory.
        q_TBCHW = projected_TBCHW[0]
        a_TBCHW = like_steps(a_TBhdN.reshape(q_TBCHW.shape), q_TBCHW)
        return a_TBCHW, self.attention_neuron(a_TBCHW)


class OverSamples(LIF):
    """A LIF on `[T, B, ...]` with one membrane for all samples of a batch, as published.

        u[t, b] = decay v[t, b-1] + x[t, b],   v[t, 0] = v[t-1, B],   v[0, B] = 0

    The output for a sample depends on the samples before it, and therefore on the order and size of
    the batch, on micro-batches and on workers. For one sample the neuron equals a LIF.
    """

    @classmethod
    def of(cls, neuron: nn.Module) -> "OverSamples":
        """An OverSamples with the settings of `neuron`.

        Raises: ValueError for a neuron that is not a plain LIF.
        """
        if type(neuron) is not LIF:
            raise ValueError(f"OverSamples: the neuron must be a LIF; got {type(neuron).__name__}")
        return cls(
            neuron.decay,
            threshold=neuron.threshold,
            comparison=neuron.comparison,
            reset=neuron.reset,
            subtract=neuron.subtract if neuron.reset == "subtract" else None,
            reset_gradient=neuron.reset_gradient,
            scale_input=neuron.scale_input,
            surrogate=neuron.surrogate,
            kernel=neuron.kernel,
        )

    def forward(self, x_TB: Tensor, *, gain: float = 1.0, beta: float = 1.0) -> Tensor:
        row_NB = x_TB.flatten(0, 1).unsqueeze(1)
        return super().forward(row_NB, gain=gain, beta=beta).view_as(x_TB)


def qkformer_10(
    channels: Literal[384, 512, 768] = 384,
    *,
    classes: int = 1000,
    in_channels: int = 3,
    shortcut: Shortcut = "sew",
    norm: Norm = "batch",
    over: StatisticsOver = "step",
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


# Published tensors that this network does not need: the end of their name, and the reason.
IGNORED_TENSORS = {
    "num_batches_tracked": (
        "counts calls for torch's cumulative average; batch norm with a momentum never reads it"
    )
}

# Our name of each synapse with its norm, and the published name.
_PUBLISHED_NAMES = {
    "stem.0": "patch_embed{stage}.proj",
    "residual.branch.0": "patch_embed{stage}.proj{first}",
    "residual.branch.2": "patch_embed{stage}.proj{second}",
    "residual.shortcut.0": "patch_embed{stage}.proj_res",
    "attention.branch.projections.q.currents": "stage{stage}.{block}.{attention}.q",
    "attention.branch.projections.k.currents": "stage{stage}.{block}.{attention}.k",
    "attention.branch.projections.v.currents": "stage{stage}.{block}.{attention}.v",
    "attention.branch.project": "stage{stage}.{block}.{attention}.proj",
    "ffn.branch.0": "stage{stage}.{block}.mlp.fc1",
    "ffn.branch.2": "stage{stage}.{block}.mlp.fc2",
}
_KINDS = {"synapse": "conv", "norm": "bn"}


def published_name(name: str) -> str:
    """The published name of one of our tensors.

    Raises: ValueError for a tensor without a published name.
    """
    if name.startswith("classifier."):
        return name.replace("classifier", "head", 1)
    match = re.fullmatch(r"stages\.(\d)\.(\d+)\.(.+)\.(synapse|norm)\.(\w+)", name)
    if match is None or match[3] not in _PUBLISHED_NAMES:
        raise ValueError(
            "published_name: only tensors of a QKFormer with shortcut='sew' were published; got"
            f" {name}"
        )
    first, second = (1, 2) if match[1] == "0" else (3, 4)
    layer = _PUBLISHED_NAMES[match[3]].format(
        stage=int(match[1]) + 1,
        block=int(match[2]) - 1,
        attention="attn" if match[1] == "2" else "tssa",
        first=first,
        second=second,
    )
    return f"{layer}_{_KINDS[match[4]]}.{match[5]}"


def from_published(
    published: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    over: StatisticsOver = "time",
    projection_neuron: ProjectionNeuron = "over_time",
) -> QKFormer:
    """A QKFormer with published weights. Its sizes are those of the tensors.

    Args:
        published: tensors under their published names.
        heads: heads of every attention. No tensor shows the number. None: one per 64 channels, as
            published for ImageNet.
        over: statistics of batch norm in training (`models/residual.py`). "time" is the published
            network. Rules that run in slices need "step", which changes the network.
        projection_neuron: "over_samples" is as in the published code; outputs then depend on the
            batch.

    Raises: ValueError for missing or unknown tensors, tensors of another shape, or no `heads` for
    fewer than 64 channels.
    """
    classes, channels = _sizes(published, "head.weight", 2)
    require(
        heads is not None or channels >= 64,
        f"from_published: heads must be set for fewer than 64 channels; got {channels} channels",
    )
    with torch.device("meta"):
        network = QKFormer(
            channels=channels,
            depth=len({name.rsplit(".mlp.", 1)[0] for name in published if ".mlp." in name}),
            heads=channels // 64 if heads is None else heads,
            classes=classes,
            in_channels=_sizes(published, "patch_embed1.proj_conv.weight", 4)[1],
            expansion=_sizes(published, "stage1.0.mlp.fc1_conv.weight", 4)[0] * 4 // channels,
            over=over,
            projection_neuron=projection_neuron,
        )
    network.to_empty(device="cpu")
    tensors = to_our_names(published, network)
    mismatch = describe_mismatch(tensors, network.state_dict())
    require(
        not mismatch,
        f"from_published: the weights must be those of a published QKFormer; got {mismatch}",
    )
    network.load_state_dict(tensors)
    return network


def _sizes(published: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    sizes = tuple(published[name].shape) if name in published else ()
    require(
        len(sizes) == dimensions,
        f"from_published: the tensor '{name}' must have {dimensions} dimensions; got"
        f" {sizes or 'none'}",
    )
    return sizes


def is_published(weights: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("patch_embed1.") for name in weights)


def to_our_names(published: Mapping[str, Tensor], network: QKFormer) -> dict[str, Tensor]:
    """Published tensors under the names, and with the dimensions, of `network`'s tensors.

    A tensor that `network` does not have keeps its name. Sizes are not checked.

    Raises: ValueError for a shortcut other than "sew", for which nothing was published.
    """
    require(
        isinstance(network.last, nn.Identity),
        "QKFormer: published weights need a network with shortcut='sew'; got a network with a"
        " real-valued stream",
    )
    remaining = {
        name: tensor
        for name, tensor in published.items()
        if name.rsplit(".", 1)[-1] not in IGNORED_TENSORS
    }
    tensors = {}
    for name, own in network.state_dict().items():
        if published_name(name) in remaining:
            tensor = remaining.pop(published_name(name))
            # Published synapses of an attention are 1-D convolutions over tokens.
            tensors[name] = tensor.unsqueeze(-1) if tensor.dim() + 1 == own.dim() == 4 else tensor
    return tensors | remaining


def to_published(network: QKFormer) -> dict[str, Tensor]:
    """Our weights under the published names and in the published shapes.

    Published synapses of an attention are 1-D convolutions over tokens.
    """
    return {
        published_name(name): tensor.squeeze(-1)
        if ".attention." in name and name.endswith("synapse.weight")
        else tensor
        for name, tensor in network.state_dict().items()
    }
