"""Attention without softmax, and what the spiking Transformers share: blocks, readout, names.

q, k and v are the spikes behind 1x1 synapses that read the stream. These spikes are split into
heads of d channels. The tokens are the N pixels.

    TokenQK         a[n] = L'(sum_d q[d, n]) k[ . , n],       y = S a
                    a mask over tokens: O(N C)
    ChannelMask     a[n] = L'(sum_m k[m] v[m]) q[n],          y = S a
                    a mask over channels, the same for any number of heads: O(N C)
    SelfAttention   a[n] = scale sum_m (q[n] . k[m]) v[m],    y = S L'(a)
                    computed as (sum_m v[m] k[m]^T) q[n]: O(N C d)

L' is a neuron of threshold 0.5, and S the last synapse with its norm. On a real-valued stream one
neuron precedes q, k and v, and none follows S. Under "multiple_all" each projection has its own
shortcut: the stream is added to the currents of q, k and v, and a is added to y. (In SelfAttention
a is the input of L'. TokenQK has no neuron before S, so its a consists of spikes.)

Source: Zhou et al. 2023 (Spikformer, arXiv 2209.15425), Yao et al. 2023 (ChannelMask, arXiv
2307.01694), Zhou et al. 2024 (TokenQK, arXiv 2403.16552); the shortcuts of an attention: Le & Li
2023 (BinaryViT, arXiv 2306.16678).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_one_of, require
from pipeline.models.published import PublishedNames
from pipeline.models.residual import BlockFactory, Layer, named_sequential
from pipeline.spiking.kernels.operators import like_steps
from pipeline.spiking.neuron import LIF
from pipeline.spiking.surrogate import Sigmoid
from pipeline.spiking.synapse import Linear

# T time, B batch, C channels, H W pixels, K classes; h heads, d channels of a head, N tokens

ATTENTION_THRESHOLD = 0.5
SCALE = 0.125

# The neuron after a SelfAttention has a membrane per sample, or one membrane for all samples.
ProjectionNeuron = Literal["over_time", "over_samples"]

# SpikingJelly's LIF at tau 2, as in the published code of all these networks.
NEURON = LIF(0.5, reset="zero", scale_input=True, surrogate=Sigmoid(4.0))


class SpikingTransformer(nn.Module):
    """logits = classifier(last(mean over tokens of features(x))).

    `[T, B, C, H, W]` to `[T, B, K]`. The base class of published networks. Weights under their
    published names are read by the `from_published` of the network's file.

    Args:
        channels: of `features`' output.
        last: the neuron that reads the mean over tokens; None: the classifier reads it.
    """

    published: ClassVar[PublishedNames]

    def __init__(
        self, features: nn.Module, *, channels: int, classes: int, last: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.features = features
        self.last = nn.Identity() if last is None else last
        self.classifier = Linear(channels, classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return self.classifier(self.last(self.features(x_TBCHW).mean((3, 4))))


# `re.sub`s that make published names of the blocks, the classifier and the layers.
BLOCK_NAMES = (
    (r"\.attention\.branch\.projections\.(\w)\.currents\.", r".attn.\1."),
    (r"\.attention\.branch\.project\.", ".attn.proj."),
    (r"\.ffn\.branch\.0\.", ".mlp.fc1."),
    (r"\.ffn\.branch\.2\.", ".mlp.fc2."),
    (r"\.synapse\.", "_conv."),
    (r"\.norm\.", "_bn."),
    (r"^classifier\.", "head."),
)


def block(
    blocks: BlockFactory,
    channels: int,
    attention: Callable[[], nn.Module],
    *,
    expansion: int,
    drop_path: float = 0.0,
) -> nn.Sequential:
    """Attention, or what takes its place, and FFN, each with its shortcut."""
    wrapped_attention = blocks.wrap(attention(), drop_path=drop_path)
    hidden = channels * expansion
    layers = [Layer(channels, hidden, bias=True), Layer(hidden, channels, bias=True)]
    ffn = blocks.residual(layers, last_gain=blocks.branch_gain, drop_path=drop_path)
    ffn.part = "ffn"  # type: ignore[assignment]  # read by models/transforms.py
    return named_sequential(attention=wrapped_attention, ffn=ffn)


class Projection(nn.Module):
    """Spikes of q, k or v: neuron(currents(h)), or neuron(currents(h) + x)."""

    def __init__(self, currents: nn.Module, neuron: nn.Module) -> None:
        super().__init__()
        self.currents = currents
        self.neuron = neuron

    def forward(self, h_TBCHW: Tensor, x_TBCHW: Tensor | None) -> Tensor:
        currents = self.currents(h_TBCHW)
        return self.neuron(currents if x_TBCHW is None else currents + x_TBCHW)


class Attention(nn.Module):
    """Base class of all attentions; `_mix` combines tokens. The output has the input's shape.

    Args:
        values: the channels of v; None: there is no v.
        normed_synapse: makes the synapses with their norms; None: `blocks.normed_synapse`.
        project_bias: whether S has a bias.
        threshold: of L'; None: the threshold of the other neurons.
    """

    def __init__(
        self,
        blocks: BlockFactory,
        channels: int,
        *,
        heads: int,
        values: int | None = None,
        normed_synapse: Callable[..., nn.Module] | None = None,
        project_bias: bool = True,
        threshold: float | None = ATTENTION_THRESHOLD,
    ) -> None:
        super().__init__()
        build = normed_synapse or blocks.normed_synapse
        widths = {"q": channels, "k": channels} | ({} if values is None else {"v": values})
        self.heads = heads
        self.has_shortcuts = blocks.shortcut == "multiple_all"
        self.first = nn.Identity() if blocks.carries_spikes else blocks.stream_neuron()
        self.projections = nn.ModuleDict(
            {
                name: Projection(build(Layer(channels, width)), blocks.neuron())
                for name, width in widths.items()
            }
        )
        self.attention_neuron = blocks.branch_neuron(threshold=threshold)
        self.project = build(
            Layer(values or channels, channels, bias=project_bias), gain=blocks.branch_gain
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


class ChannelMask(Attention):
    """A mask over the channels of q, computed from k and v."""

    def __init__(self, blocks: BlockFactory, channels: int) -> None:
        super().__init__(blocks, channels, heads=1, values=channels)

    def _mix(self, *projected_TBCHW: Tensor) -> tuple[Tensor, Tensor]:
        q_TBCHW, k_TBCHW, v_TBCHW = projected_TBCHW
        shared_TBC11 = (k_TBCHW * v_TBCHW).sum((3, 4), keepdim=True)
        a_TBCHW = q_TBCHW * self.attention_neuron(shared_TBC11)
        return a_TBCHW, a_TBCHW


class SelfAttention(Attention):
    """Attention between all tokens, at a cost linear in their number.

    Further arguments are those of `Attention`; by default v has the channels of q and k.

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
        scale: float = SCALE,
        values: int | None = None,
        normed_synapse: Callable[..., nn.Module] | None = None,
        project_bias: bool = True,
        threshold: float | None = ATTENTION_THRESHOLD,
    ) -> None:
        super().__init__(
            blocks,
            channels,
            heads=heads,
            values=values or channels,
            normed_synapse=normed_synapse,
            project_bias=project_bias,
            threshold=threshold,
        )
        self.scale = scale
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
        a_TBhdN = v_TBhdN @ k_TBhdN.transpose(-1, -2) @ q_TBhdN * self.scale
        # A matrix product is contiguous, also if the channels of its factors are last in memory.
        v_TBCHW = projected_TBCHW[-1]
        a_TBCHW = like_steps(a_TBhdN.reshape(v_TBCHW.shape), v_TBCHW)
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
