"""Synapses: linear layers and convolutions on time-first tensors, whose backward a rule can change.

`weights="standardized"` is scaled weight standardisation (sWS), the normalisation of networks
without batch norm:

    W^ = gain (W - mean) / sqrt(fan_in var + 1e-4)
    mean and unbiased var per output filter, gain learnable

A `binarizer` (`spiking/binary.py`) computes a 1-bit weight from the parameter; then `weights` is
"1-bit". Standardised and 1-bit weights are computed once for all slices of a batch
(`slice_cache.py`), unless the rule changes weights between slices.

A seam is an attribute of a module that a rule sets to change the module's forward or backward. A
synapse has two seams (g = dL/dy is the gradient of the output):

    presynaptic: x_TB -> factor_TB        dL/dW = sum_t g[t] factor[t]^T   (without it: factor = x)
    backward_weight: weight -> weight     dL/dx = backward_weight(W)^T g   (without it: W^T g)

The seams are independent of each other. Even with seams, a convolution has one forward operation
and one backward operation. With a seam, each time step of a static input is computed.

`forward` accepts another `weight` for this call, such as one with a limited norm
(`spiking/norm_limit.py`). Bias and seams are used as usual.

Source of sWS: Brock et al. 2021 (arXiv 2101.08692), eq. 1, in the form of OTTT's and SLTT's
NF-ResNet.
"""

# T time, B batch, C channels, H W pixels

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.checks import refuse_unless_one_of, require
from pipeline.spiking.encode import frame_of, is_static, repeat
from pipeline.spiking.kernels.operators import dense
from pipeline.spiking.kernels.packing import height_of, pack, unpack
from pipeline.spiking.slice_cache import SliceCache
from pipeline.spiking.state import State

STANDARDIZATION_EPS = 1e-4

# The kinds of weights that a synapse can be created with.
Weights = Literal["plain", "standardized"]
Presynaptic = Callable[[Tensor], Tensor]
BackwardWeight = Callable[[Tensor], Tensor]


def apply_folded(op: Callable[[Tensor], Tensor], x_TB: Tensor) -> Tensor:
    """Apply the stateless map `op` to all time steps at once, with T and B as one batch dimension.

    For a static input, `op` is applied to one frame.
    """
    if is_static(x_TB):
        return repeat(op(frame_of(x_TB)), len(x_TB))
    return op(x_TB.flatten(0, 1)).unflatten(0, x_TB.shape[:2])


class _Synapse(nn.Module):
    weight: Tensor

    def _init_synapse(self, weights: Weights) -> None:
        refuse_unless_one_of(type(self).__name__, ("plain", "standardized"), weights=weights)
        self.weights: str = weights
        self.gain: nn.Parameter | None = None
        if weights == "standardized":
            require(
                self.weight[0].numel() >= 2,
                f"{type(self).__name__}: standardized weights need a fan-in of at least 2; got"
                f" {self.weight[0].numel()}",
            )
            self.gain = nn.Parameter(torch.ones(len(self.weight), *[1] * (self.weight.dim() - 1)))
        self.binarizer: nn.Module | None = None
        self.slice_cache: SliceCache | None = None
        self.state = State(type(self).__name__)
        self.packs_spikes = False
        self.presynaptic: Presynaptic | None = None
        self.backward_weight: BackwardWeight | None = None


class Linear(nn.Linear, _Synapse):
    """`torch.nn.Linear` on `[T, B, ..., C]`, with `weights` and seams (see the head of the file).

    Raises: ValueError for unknown `weights`, standardised weights with a fan-in of 1, an input
    without a time axis, or a `presynaptic` factor whose shape is not that of the input.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, weights: Weights = "plain"
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self._init_synapse(weights)

    def forward(self, input: Tensor, weight: Tensor | None = None) -> Tensor:
        if input.dim() < 3:
            raise ValueError(
                "Linear: the input must be time first, [T, B, ..., C]; got shape"
                f" {tuple(input.shape)}"
            )
        postpones = weight is None and _postpones(self, input)
        weight, bias = _operands(self, input, weight)
        if not (postpones or _is_changed(self, input)):
            if is_static(input):
                return repeat(F.linear(frame_of(input), weight, bias), len(input))
            return F.linear(input, weight, bias)
        return _with_seams(self, input, weight, bias, postpones=postpones)


class Conv2d(nn.Conv2d, _Synapse):
    """`torch.nn.Conv2d` on `[T, B, C, H, W]` with zero padding.

    It has `weights` and seams (see the head of the file).

    Raises: ValueError in the cases of `Linear`, or for a `padding` that is text.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        weights: Weights = "plain",
    ) -> None:
        require(
            not isinstance(padding, str),
            f"Conv2d: padding must be a number of pixels; got padding={padding!r}",
        )
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )
        self._init_synapse(weights)

    def forward(self, input: Tensor, weight: Tensor | None = None) -> Tensor:
        if input.dim() != 5:
            raise ValueError(
                "Conv2d: the input must be time first, [T, B, C, H, W]; got shape"
                f" {tuple(input.shape)}"
            )
        postpones = weight is None and _postpones(self, input)
        weight, bias = _operands(self, input, weight)
        if not (postpones or _is_changed(self, input)):
            return apply_folded(lambda x_NCHW: self._conv_forward(x_NCHW, weight, bias), input)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return _with_seams(self, input, weight, bias, geometry, postpones=postpones)


def effective_weight(synapse: Linear | Conv2d) -> Tensor:
    """The weight in the forward: the parameter, or its standardised or 1-bit form."""
    if synapse.binarizer is not None:
        return synapse.binarizer(synapse.weight)
    return synapse.weight if synapse.gain is None else _standardized(synapse.weight, synapse.gain)


def _operands(
    synapse: Linear | Conv2d, x_TB: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The weight, unless it is given, and the bias, in the dtype of the product.

    If `x_TB` has only a part of the T steps, what has to be computed for them is taken from the
    cache: standardised and 1-bit weights, and operands that autocast would convert at each slice.
    """
    cache, bias, dtype = synapse.slice_cache, synapse.bias, autocast_dtype(x_TB)
    if cache is None or len(x_TB) == cache.steps:
        return effective_weight(synapse) if weight is None else weight, bias
    is_computed = synapse.gain is not None or synapse.binarizer is not None
    if weight is None and (is_computed or dtype is not None):
        weight = cache.once(synapse.state, partial(_weight_in, synapse, dtype))
    if bias is not None and dtype is not None:
        bias = cache.once(synapse.state, partial(bias.to, dtype), "bias")
    return effective_weight(synapse) if weight is None else weight, bias


def _weight_in(synapse: Linear | Conv2d, dtype: torch.dtype | None) -> Tensor:
    weight = effective_weight(synapse)
    return weight if dtype is None else weight.to(dtype)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast converts the operands of products; None: autocast is off."""
    device = "cpu" if x.is_meta else x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _standardized(weight: Tensor, gain: Tensor) -> Tensor:
    fan_in = weight[0].numel()
    # Batch norm with filters as channels is one fused operation (as in timm's ScaledStdConv). For
    # the backward it keeps only the parameter, and a mean and a scale per filter. Its variance is
    # biased, so gain and eps are converted:
    # fan_in unbiased + eps = fan_in^2 / (fan_in - 1) (biased + eps (fan_in - 1) / fan_in^2).
    scale = math.sqrt(fan_in - 1) / fan_in
    # The order of memory is kept; channels may come last.
    in_memory = weight if weight.is_contiguous() else weight.movedim(1, -1)
    standardized = F.batch_norm(
        in_memory.reshape(1, weight.shape[0], fan_in),
        None,
        None,
        (gain * scale).flatten(),
        training=True,
        eps=STANDARDIZATION_EPS * scale**2,
    ).view(in_memory.shape)
    return standardized if in_memory is weight else standardized.movedim(-1, 1)


def request_seams(model: nn.Module) -> None:
    """Make layers of `model` synapses where a module has `give_seams` (`models/foreign`).

    A rule that sets seams calls it before it looks for synapses.
    """
    for module in model.modules():
        give_seams = getattr(module, "give_seams", None)
        if give_seams is not None:
            give_seams()


def is_inside(name: str, modules: Sequence[str]) -> bool:
    """Whether a module or parameter `name` is one of `modules` or is inside one of them."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def error_weight(weight: Tensor, backward_weight: BackwardWeight | None) -> Tensor:
    """The weight in the gradient of the input.

    It is computed in the backward, so the graph does not keep it.
    """
    return weight if backward_weight is None else backward_weight(weight).to(weight.dtype)


def pack_spikes(model: nn.Module) -> None:
    """Let every synapse of `model` keep spikes for its backward as bits. Gradients do not change.

    It applies where the input of a synapse is the output of neurons, unless a rule replaces it by a
    trace.

    Raises: ValueError for a model without synapses.
    """
    synapses = [module for module in model.modules() if isinstance(module, _Synapse)]
    require(
        synapses,
        "pack_spikes: the model must have a synapse (pipeline.spiking.synapse); got"
        f" {type(model).__name__}",
    )
    for synapse in synapses:
        synapse.packs_spikes = True


def _is_changed(synapse: Linear | Conv2d, x_TB: Tensor) -> bool:
    """Whether the backward is not torch's own."""
    has_seam = synapse.presynaptic is not None or synapse.backward_weight is not None
    return has_seam or _packed_height(synapse, x_TB) is not None


def _postpones(synapse: Linear | Conv2d, x_TB: Tensor) -> bool:
    """Whether the weight gradient of this slice is computed with those of other slices, at the last
    slice of the batch.

    One product over all these slices is faster than a product and an addition for each. Their
    inputs and output gradients are kept for it, so they must take at most a quarter of the weight's
    memory. Then the growth of memory with the batch hardly changes where this stops. The last slice
    computes its own gradient.
    """
    cache = synapse.slice_cache
    if (
        cache is None
        or cache.is_last
        or not cache.collects_gradients
        or not synapse.weight.requires_grad
        or (is_static(x_TB) and len(x_TB) > 1)  # one frame is computed
    ):
        return False
    earlier = cache.postponed.get(synapse.state)
    if earlier is not None and earlier.shape != x_TB.shape[1:]:
        return False  # it runs at several sizes
    outputs, inputs, *_ = synapse.weight.shape
    stride = math.prod(synapse.stride) if isinstance(synapse, Conv2d) else 1
    inputs *= synapse.groups if isinstance(synapse, Conv2d) else 1
    kept = x_TB.numel() * (1 + outputs / (inputs * stride)) * (cache.steps / len(x_TB) - 1)
    return kept <= synapse.weight.numel() / 4


class _Postponed:
    """The weight gradients of one synapse in the slices of a batch, to be computed together.

    The state of the synapse keeps the factor and the output gradient of each slice.
    """

    def __init__(
        self, synapse: Linear | Conv2d, x_TB: Tensor, weight: Tensor, geometry: Any
    ) -> None:
        self.state, self.weight, self.geometry = synapse.state, weight.detach(), geometry
        self.shape = x_TB.shape[1:]
        self.root = self.state.values.get("y", synapse.weight)  # gets the gradient
        assert synapse.slice_cache is not None
        synapse.slice_cache.postponed[self.state] = self

    def keep(self, factor_TB: Tensor, g_TB: Tensor) -> None:
        number = sum(name.startswith("kept input") for name in self.state.values)
        self.state.write(f"kept input {number}", factor_TB)
        self.state.write(f"kept gradient {number}", g_TB)

    def gradient(self) -> Tensor | None:
        """The weight gradient of all kept slices, which are then forgotten."""
        names = [name for name in self.state.values if name.startswith("kept ")]
        kept = [self.state.values.pop(name) for name in names]
        return _weight_gradient(kept[::2], kept[1::2], self.weight, self.geometry) if kept else None


def _weight_gradient(
    factors_TB: Sequence[Tensor], gs_TB: Sequence[Tensor], weight: Tensor, geometry: Any
) -> Tensor:
    """The weight gradient of slices, from the factor and the output gradient of each."""
    last = -2 if geometry is None else 1  # one batch dimension, so that channels may stay last
    factor_N, g_N = (
        torch.cat([each_TB.flatten(0, last) for each_TB in each]) for each in (factors_TB, gs_TB)
    )
    if geometry is None:
        return g_N.T @ factor_N
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution_backward(
        *(g_N, factor_N, weight, None),
        *(stride, padding, dilation, False, [0, 0], groups, [False, True, False]),
    )[1]


def _packed_height(synapse: Linear | Conv2d, x_TB: Tensor) -> float | None:
    """The height of spikes that are kept as bits; None: the input is kept as it is."""
    is_packed = synapse.packs_spikes and synapse.presynaptic is None and torch.is_grad_enabled()
    return height_of(x_TB) if is_packed else None


def _with_seams(
    synapse: Linear | Conv2d,
    x_TB: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, ...] | None = None,
    *,
    postpones: bool,
) -> Tensor:
    """The output of a synapse with a seam, packed spikes or a postponed gradient, with its own
    backward.

    `geometry` has stride, padding, dilation and groups of a convolution; None: the synapse is a
    `Linear`.

    All operands get one dtype, because autocast does not convert operands of custom operations.

    Raises: ValueError if the factor of `presynaptic` has another shape than the input.
    """
    with torch.no_grad():
        factor_TB = x_TB if synapse.presynaptic is None else synapse.presynaptic(x_TB)
    if factor_TB.shape != x_TB.shape:
        raise ValueError(
            f"presynaptic: the factor must have the shape of the input, {tuple(x_TB.shape)}; got"
            f" {tuple(factor_TB.shape)}"
        )
    dtype = autocast_dtype(x_TB) or weight.dtype
    postponed = None
    if postpones:
        postponed = _Postponed(synapse, x_TB, weight.to(dtype), geometry)
        weight = weight.detach().requires_grad_()  # hooks of the weight itself would see None
    return _WithSeams.apply(  # type: ignore[return-value]
        x_TB.to(dtype),
        factor_TB.to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        synapse.backward_weight,
        geometry,
        _packed_height(synapse, x_TB),
        postponed,
    )


class _WithSeams(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TB: Tensor,
        factor_TB: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        backward_weight: BackwardWeight | None,
        geometry: tuple[Any, ...] | None,
        height: float | None,
        postponed: _Postponed | None,
    ) -> Tensor:
        ctx.unpack, ctx.postponed = None, postponed
        if height is not None:
            factor_TB = dense(factor_TB)
            about = factor_TB.shape, factor_TB.stride(), factor_TB.dtype, height
            ctx.unpack, factor_TB = lambda bits: unpack(bits, *about), pack(factor_TB)
        ctx.save_for_backward(factor_TB, weight)
        ctx.backward_weight, ctx.geometry = backward_weight, geometry
        if geometry is None:
            return F.linear(x_TB, weight, bias)
        return F.conv2d(x_TB.flatten(0, 1), weight, bias, *geometry).unflatten(0, x_TB.shape[:2])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g_TB,) = grad_outputs
        factor_TB, weight = ctx.saved_tensors
        factor_TB = factor_TB if ctx.unpack is None else ctx.unpack(factor_TB)
        needs_x, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        g_weight = g_bias = None
        if ctx.postponed is not None and needs_weight:
            needs_weight = False
            ctx.postponed.keep(factor_TB, g_TB)
            if needs_bias and ctx.geometry is not None:
                # A CPU would compute the weight gradient with that of the bias.
                needs_bias, g_bias = False, g_TB.sum((0, 1, 3, 4))
        if ctx.geometry is None:
            if needs_weight:
                g_weight = g_TB.flatten(0, -2).T @ factor_TB.flatten(0, -2)
            return (
                g_TB @ error_weight(weight, ctx.backward_weight) if needs_x else None,
                None,
                g_weight,
                g_TB.flatten(0, -2).sum(0) if needs_bias else None,
                *[None] * 4,
            )
        stride, padding, dilation, groups = ctx.geometry
        # This operation uses the values of the input only for the weight gradient, and the weight
        # only for the input gradient. So one call is enough, with both of them replaced.
        g_x, own_g_weight, own_g_bias = torch.ops.aten.convolution_backward(
            g_TB.flatten(0, 1),
            factor_TB.flatten(0, 1),
            error_weight(weight, ctx.backward_weight),
            [weight.shape[0]],
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            [needs_x, needs_weight, needs_bias],
        )
        return (
            g_x.view_as(factor_TB) if needs_x else None,
            None,
            own_g_weight if needs_weight else g_weight,
            own_g_bias if needs_bias else g_bias,
            *[None] * 4,
        )
