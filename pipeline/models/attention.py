"""Attention without softmax, on spikes: QKFormer's two.

q, k, v are spikes of 1x1 synapses that read the stream, split into heads of d channels; the tokens
are the N pixels.

    TokenQK          a[n] = L'(sum_d q[d, n]) k[ . , n]          y = S a         a mask over tokens:
    O(N C) SelfAttention    a[n] = SCALE sum_m (q[n] . k[m]) v[m]       y = S L'(a)     computed as
    (sum_m v[m] k[m]^T) q[n]: O(N C d)

with L' a neuron of threshold 0.5, and S the last synapse and its norm. On a stream of real numbers
one neuron stands before q, k and v, and none behind S. Under "multiple_all" each projection has a
shortcut of its own: the stream is added to the currents of q, k and v, and a to y. (In
SelfAttention a is what the last neuron reads; TokenQK has no neuron before S, and a is spikes.)

The neuron behind S of SelfAttention may run as the published code has it,
`projection_neuron="over_samples"`: see `OverSamples`. Published accuracies were measured so.

Source: Zhou et al. 2024 (QKFormer, arXiv 2403.16552); Zhou et al. 2023 (Spikformer, arXiv
2209.15425); the shortcuts: Le & Li 2023 (BinaryViT, arXiv 2306.16678).
"""

# T time, B batch, C channels, H W pixels; h heads, d channels of a head, N tokens

from typing import Literal

from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_one_of
from pipeline.models.residual import Blocks, Layer
from pipeline.spiking.neuron import LIF

ATTENTION_THRESHOLD = 0.5
SCALE = 0.125

ProjectionNeuron = Literal["over_time", "over_samples"]
"""what the membrane behind a SelfAttention crosses: time steps of one sample, or samples"""


class OverSamples(LIF):
    """The LIF on `[T, B, ...]`, one membrane for all samples: it runs over the B samples of a step,
    then over the next step's.

        u[t, b] = decay v[t, b-1] + x[t, b],      v[t, 0] = v[t-1, B],      v[0, B] = 0

    What a sample gives depends on the samples before it in its batch, and so on the order and size
    of the batch, on micro-batches and on workers. In a batch of one it is the LIF.
    """

    @classmethod
    def of(cls, neuron: nn.Module) -> "OverSamples":
        """Raises: ValueError for a neuron that is no plain LIF."""
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
    """Spikes for one of q, k, v: neuron(norm(synapse(h))), with the stream added to the currents
    where it is given.
    """

    def __init__(self, blocks: Blocks, channels: int) -> None:
        super().__init__()
        self.currents = blocks.currents(Layer(channels, channels))
        self.neuron = blocks.neuron()

    def forward(self, h_TBCHW: Tensor, x_TBCHW: Tensor | None) -> Tensor:
        currents = self.currents(h_TBCHW)
        return self.neuron(currents if x_TBCHW is None else currents + x_TBCHW)


class Attention(nn.Module):
    """`[T, B, C, H, W]` to the same; `_mix` says how the tokens meet.

    Raises: ValueError for channels that do not divide into the heads.
    """

    def __init__(
        self, blocks: Blocks, channels: int, *, heads: int, projections: tuple[str, ...]
    ) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(
                f"{type(self).__name__}: the channels must divide into heads; got {channels} and"
                f" heads={heads}"
            )
        self.heads = heads
        self.has_shortcuts = blocks.shortcut == "multiple_all"
        self.first = nn.Identity() if blocks.carries_spikes else blocks.stream_spikes()
        self.projections = nn.ModuleDict(
            {name: Projection(blocks, channels) for name in projections}
        )
        self.attention_neuron = blocks.spikes(threshold=ATTENTION_THRESHOLD)
        self.project = blocks.currents(Layer(channels, channels, bias=True), gain=blocks.silent)
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

    def __init__(self, blocks: Blocks, channels: int, *, heads: int) -> None:
        super().__init__(blocks, channels, heads=heads, projections=("q", "k"))

    def _mix(self, *heads_TBhdN: Tensor, shape: tuple[int, ...]) -> Tensor:
        q_TBhdN, k_TBhdN = heads_TBhdN
        mask_TBh1N = self.attention_neuron(q_TBhdN.sum(3, keepdim=True))
        a = (mask_TBh1N * k_TBhdN).reshape(shape)
        y = self.project(a)
        return y + a if self.has_shortcuts else y


class SelfAttention(Attention):
    """Every token sees every other; linear in their number.

    Raises: ValueError for a `projection_neuron` that is unknown, or that runs over samples where no
    LIF stands behind S."""

    def __init__(
        self,
        blocks: Blocks,
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
            if not blocks.carries_spikes:
                raise ValueError(
                    "SelfAttention: projection_neuron='over_samples' needs a neuron behind the"
                    f" attention, as shortcut='sew' has; got shortcut={blocks.shortcut!r}"
                )
            self.last = OverSamples.of(self.last)

    def _mix(self, *heads_TBhdN: Tensor, shape: tuple[int, ...]) -> Tensor:
        q_TBhdN, k_TBhdN, v_TBhdN = heads_TBhdN
        seen_TBhdd = v_TBhdN @ k_TBhdN.transpose(-1, -2)
        a = (seen_TBhdd @ q_TBhdN * SCALE).reshape(shape)
        y = self.project(self.attention_neuron(a))
        return y + a if self.has_shortcuts else y
