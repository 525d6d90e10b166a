"""Spiking attention without softmax: the two attentions of QKFormer.

q, k and v are spikes of 1x1 synapses that read the stream. They are split into heads of d channels.
The tokens are the N pixels.

    TokenQK         a[n] = L'(sum_d q[d, n]) k[ . , n],       y = S a
                    a mask over tokens: O(N C)
    SelfAttention   a[n] = SCALE sum_m (q[n] . k[m]) v[m],    y = S L'(a)
                    computed as (sum_m v[m] k[m]^T) q[n]: O(N C d)

L' is a neuron of threshold 0.5, and S the last synapse with its norm. On a real-valued stream one
neuron precedes q, k and v, and none follows S. Under "multiple_all" each projection has its own
shortcut: the stream is added to the currents of q, k and v, and a is added to y. (In SelfAttention
a is the input of the last neuron. TokenQK has no neuron before S, so a is spikes.)

With `projection_neuron="over_samples"` the neuron after SelfAttention's S runs as in the published
code, see `OverSamples`. Published accuracies were measured with it.

Source: Zhou et al. 2024 (QKFormer, arXiv 2403.16552); Zhou et al. 2023 (Spikformer, arXiv
2209.15425); the shortcuts: Le & Li 2023 (BinaryViT, arXiv 2306.16678).
"""

# T time, B batch, C channels, H W pixels; h heads, d channels of a head, N tokens

from typing import Literal

from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_one_of, require
from pipeline.models.residual import BlockFactory, Layer
from pipeline.spiking.neuron import LIF

ATTENTION_THRESHOLD = 0.5
SCALE = 0.125

ProjectionNeuron = Literal["over_time", "over_samples"]
"""what the membrane after a SelfAttention is carried across: time steps of one sample, or
samples
"""


class OverSamples(LIF):
    """A LIF on `[T, B, ...]` with one membrane for all samples of a batch, as published.

        u[t, b] = decay v[t, b-1] + x[t, b],   v[t, 0] = v[t-1, B],   v[0, B] = 0

    The output for a sample depends on the samples before it, and so on the order and size of the
    batch, on micro-batches and on workers. In a batch of one it is the LIF.
    """

    @classmethod
    def of(cls, neuron: nn.Module) -> "OverSamples":
        """An OverSamples with the settings of `neuron`.

        Raises: ValueError for a neuron that is not a plain LIF.
        """
        if type(neuron) is not LIF:
            raise ValueError(f"OverSamples: the neuron must be a LIF; got {type(neuron).__name__}")
        made = cls(
            neuron.decay,
            threshold=neuron.threshold,
            scale_input=neuron.scale_input,
            surrogate=neuron.surrogate,
        )
        made.reset, made.subtract, made.reset_gradient = (
            neuron.reset,
            neuron.subtract,
            neuron.reset_gradient,
        )
        return made

    def forward(self, x_TB: Tensor) -> Tensor:
        return super().forward(x_TB.flatten(0, 1).unsqueeze(1)).view_as(x_TB)


class Projection(nn.Module):
    """Spikes of q, k or v: neuron(norm(synapse(h))); a given stream is added to the currents."""

    def __init__(self, blocks: BlockFactory, channels: int) -> None:
        super().__init__()
        self.currents = blocks.currents(Layer(channels, channels))
        self.neuron = blocks.neuron()

    def forward(self, h_TBCHW: Tensor, x_TBCHW: Tensor | None) -> Tensor:
        currents = self.currents(h_TBCHW)
        return self.neuron(currents if x_TBCHW is None else currents + x_TBCHW)


class Attention(nn.Module):
    """Base class of the attentions, `[T, B, C, H, W]` to the same shape; `_mix` combines tokens.

    Raises: ValueError for channels that are not divisible by heads.
    """

    def __init__(
        self, blocks: BlockFactory, channels: int, *, heads: int, projections: tuple[str, ...]
    ) -> None:
        super().__init__()
        require(
            heads >= 1 and not channels % heads,
            f"{type(self).__name__}: the channels must divide into heads; got {channels} and"
            f" heads={heads}",
        )
        self.heads = heads
        self.has_shortcuts = blocks.shortcut == "multiple_all"
        self.first = nn.Identity() if blocks.carries_spikes else blocks.stream_spikes()
        self.projections = nn.ModuleDict(
            {name: Projection(blocks, channels) for name in projections}
        )
        self.attention_neuron = blocks.spikes(threshold=ATTENTION_THRESHOLD)
        self.project = blocks.currents(
            Layer(channels, channels, bias=True), gain=blocks.branch_gain
        )
        self.last = blocks.neuron() if blocks.carries_spikes else nn.Identity()

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        h = self.first(x_TBCHW)
        stream = x_TBCHW if self.has_shortcuts else None
        heads = [
            each(h, stream).flatten(3).unflatten(2, (self.heads, -1))
            for each in self.projections.values()
        ]
        return self.last(self._mix(*heads, shape=x_TBCHW.shape))

    def _mix(self, *heads_TBhdN: Tensor, shape: tuple[int, ...]) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must override _mix")


class TokenQK(Attention):
    """A mask over the tokens of k."""

    def __init__(self, blocks: BlockFactory, channels: int, *, heads: int) -> None:
        super().__init__(blocks, channels, heads=heads, projections=("q", "k"))

    def _mix(self, *heads_TBhdN: Tensor, shape: tuple[int, ...]) -> Tensor:
        q_TBhdN, k_TBhdN = heads_TBhdN
        mask_TBh1N = self.attention_neuron(q_TBhdN.sum(3, keepdim=True))
        a = (mask_TBh1N * k_TBhdN).reshape(shape)
        y = self.project(a)
        return y + a if self.has_shortcuts else y


class SelfAttention(Attention):
    """Attention between all tokens; its cost is linear in their number.

    Raises: ValueError for an unknown `projection_neuron`, or one that runs over samples if no LIF
    follows S.
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
                "SelfAttention: projection_neuron='over_samples' needs a neuron behind the"
                f" attention, as shortcut='sew' has; got shortcut={blocks.shortcut!r}",
            )
            self.last = OverSamples.of(self.last)

    def _mix(self, *heads_TBhdN: Tensor, shape: tuple[int, ...]) -> Tensor:
        q_TBhdN, k_TBhdN, v_TBhdN = heads_TBhdN
        seen_TBhdd = v_TBhdN @ k_TBhdN.transpose(-1, -2)
        a = (seen_TBhdd @ q_TBhdN * SCALE).reshape(shape)
        y = self.project(self.attention_neuron(a))
        return y + a if self.has_shortcuts else y
