"""Counts the multiplications and additions of training from the multiplied values.

    with Operations(network) as counted:
        ...                                 # one batch: forward, backward and the rule's own work
    counted.work["forward"].additions

Only products count: of synapses with their inputs, of attention, of a rule's own matrices. A
product is a sum over pairs:

    y[n, o] = sum_i x[n, i] w[i, o]     one pair for each n, i, o; in a convolution, for each kernel
                                        tap inside the image

The counts come from the numbers of non-zeros along each summed index, so no intermediate is as
large as the product itself.

Each pair without a zero costs one addition. It also costs a multiplication, unless one side of the
product has one magnitude: its non-zero numbers are equal up to their sign, as spikes are. The
numbers of the other side are then added or subtracted. The multiplication of the sum by the
magnitude is not counted. In a weight, each output may have its own magnitude, as in 1-bit weights.
Means of spikes from a pool, and sums of spikes from a shortcut, have several magnitudes.

Element-wise work (neurons, norms, losses) is not counted, because it is smaller than the products
by a factor of the fan-in. Products inside a fused torch operation, such as attention or a recurrent
layer, cannot be inspected. `not_counted` names such operations.

Operations are counted by purpose: "forward"; "error", the error that backward passes to the layer
below; "weights", the gradients of weights; and the purposes in `spiking/op_scope.py`. A product in
a backward is "error" if one side is a weight (or a rule's replacement for a weight), or if it is a
batched product, as in attention. Otherwise it is "weights".
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pipeline.spiking.error_feedback import FixedFeedback
from pipeline.spiking.op_scope import current_scope

aten = torch.ops.aten


@dataclass(frozen=True)
class Work:
    """Numbers of operations."""

    multiplications: int = 0
    additions: int = 0
    dense: int = 0  # all pairs, zeros included: the multiplications of a network without spikes

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.multiplications + other.multiplications,
            self.additions + other.additions,
            self.dense + other.dense,
        )


class Pausable(AbstractContextManager[Any]):
    """Base class of instruments that observe a batch without its teacher and its optimizer."""

    is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside the block."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False


class Operations(TorchDispatchMode, Pausable):
    """Counts operations inside the `with` block; `work` holds them by purpose.

    Counting reads both sides of every product, and waits for each product on a GPU, so use it on
    single batches only. A new counter looks up the storages of the weights. Create it after engines
    such as DeepSpeed have moved the weights to flat buffers.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.work: dict[str, Work] = {}
        self.not_counted: set[str] = set()  # torch operations whose products are not in `work`
        # Storages of weights by address. The reference prevents the reuse of an address.
        self._weights: dict[int, StorageWeakRef] = {}
        for parameter in network.parameters():
            self._add_weight(parameter)
        for module in network.modules():
            feedback = getattr(module, "backward_weight", None)
            if isinstance(feedback, FixedFeedback):
                self._add_weight(feedback.matrix)
        self._parameters = frozenset(self._weights)  # addresses that stay weights

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        count = _COUNTERS.get(func.overloadpacket)
        if count is None and _is_composed(func):
            with self:  # only in inference mode: the operation is composed of others
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if not self.is_paused:
            if count is not None:
                with torch.no_grad():
                    count(self, *args, **kwargs)
            elif func.overloadpacket in _NOT_COUNTED:
                self.not_counted.add(func.overloadpacket.__name__)
        self._update_weights(func, (args, kwargs), result)
        return result

    def add(
        self, nonzero_pairs: Tensor, all_pairs: int, *, one_magnitude: bool, is_error: bool
    ) -> None:
        """Count a product.

        Args:
            nonzero_pairs: the number of pairs without a zero.
            one_magnitude: one of the two sides has one magnitude.
            is_error: in a backward, the product computes an error, not the gradient of a weight.
        """
        purpose = "forward"
        if torch._C._current_autograd_node() is not None:
            purpose = "error" if is_error else "weights"
        purpose, pairs = current_scope() or purpose, round(float(nonzero_pairs))
        work = Work(0 if one_magnitude else pairs, pairs, all_pairs)
        self.work[purpose] = self.work.get(purpose, Work()) + work

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is independent of the batch.

        Such tensors are parameters, or are computed only from parameters and constants.
        """
        return tensor.untyped_storage()._cdata in self._weights

    def any_has_one_magnitude(self, *sides: Tensor) -> bool:
        """Whether one of the sides of a product has one magnitude.

        A weight needs one magnitude only within each of its outputs, along either of its first two
        dimensions. (If a weight passes the error down, each output's error is multiplied by that
        output's magnitude before the sum.)
        """
        return any(
            (
                has_one_magnitude(side.flatten(1))
                or has_one_magnitude(side.transpose(0, 1).flatten(1))
                if self.is_weight(side)
                else has_one_magnitude(side.reshape(1, -1))
            )
            for side in sides
        )

    def _add_weight(self, weight: Tensor) -> None:
        storage = weight.untyped_storage()
        self._weights[storage._cdata] = StorageWeakRef(storage)

    def _update_weights(self, func: Any, arguments: Any, result: Any) -> None:
        """Mark results that depend only on weights as weights.

        Examples are standardised, clipped or binarised weights, or weights in another precision.
        """
        has_only_weights = all(map(self.is_weight, tensors_in(arguments)))
        for tensor in tensors_in(result):
            if has_only_weights:
                self._add_weight(tensor)
            elif func._schema.is_mutable:
                # Values of the batch were written into the tensor, so it is no longer a weight. A
                # parameter stays a weight when an optimizer updates it.
                address = tensor.untyped_storage()._cdata
                if address not in self._parameters:
                    self._weights.pop(address, None)


@functools.cache
def _is_composed(func: Any) -> bool:
    """Whether torch composes an operation of others, in inference mode too."""
    return func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among the arguments or the results of an operation."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple, dict)):
        for each in values.values() if isinstance(values, dict) else values:
            yield from tensors_in(each)


# -------------------------------------------------------------------------------- torch's operators


# N samples and time steps, I inputs, O outputs, G groups; ... stands for pixels or kernel taps


def _product(
    sides: Callable[..., tuple[Tensor, Tensor]], operations: Operations, *args: Any, **_: Any
) -> None:
    """The product `[N, I] [I, O]`, or a batch of such products."""
    a, b = sides(*args)
    operations.add(
        (_count_nonzero(a, -2) * _count_nonzero(b, -1)).sum(),
        a.shape[-2] * b.numel(),
        one_magnitude=operations.any_has_one_magnitude(a, b),
        is_error=a.dim() == 3 or operations.is_weight(a) or operations.is_weight(b),
    )


def _convolution(
    operations: Operations, x: Tensor, weight: Tensor, _bias: Tensor | None, *settings: Any
) -> None:
    """Any convolution `[N, I, ...] -> [N, O, ...]`, also a transposed one.

    `settings` are its stride, padding, dilation, whether it is transposed, output padding and
    groups. The sum over a convolution of non-zero counts is the number of pairs without a zero.
    """
    _, kernel = _count_kernels(weight, *settings)
    operations.add(
        aten.convolution(_count_nonzero(x, 0).unsqueeze(0), kernel, None, *settings).sum(),
        _all_pairs(x, weight, *settings),
        one_magnitude=operations.any_has_one_magnitude(x, weight),
        is_error=True,
    )


def _convolution_backward(
    operations: Operations,
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    _bias_sizes: Any,
    *settings_and_mask: Any,
) -> None:
    """Both products of the backward have the triples (output, input, weight) of the forward.

    Each product multiplies two of the three. To count its pairs, ones replace the third. torch's
    mask says which gradients are computed: of the input, the weight and the bias.
    """
    *settings, (computes_x, computes_weight, _) = settings_and_mask
    groups, all_pairs = settings[-1], _all_pairs(x, weight, *settings)
    if computes_x:
        kernel, _ = _count_kernels(weight, *settings)
        ones = kernel.new_ones(1, groups, *x.shape[2:])
        pairs = (_count_nonzero(g, 0) * aten.convolution(ones, kernel, None, *settings)).sum()
        operations.add(
            pairs,
            all_pairs,
            one_magnitude=operations.any_has_one_magnitude(g, weight),
            is_error=True,
        )
    if computes_weight:
        g_NG, x_NG = (_count_nonzero(each.unflatten(1, (groups, -1)), 2) for each in (g, x))
        ones = x_NG.new_ones(groups, 1, *weight.shape[2:])
        pairs = (g_NG * aten.convolution(x_NG, ones, None, *settings)).sum()
        operations.add(
            pairs, all_pairs, one_magnitude=operations.any_has_one_magnitude(g, x), is_error=False
        )


def _count_kernels(
    weight: Tensor,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Numbers of non-zeros in a weight: over the inputs, and over the outputs of each group.

    The first result is the weight of a convolution with one input per group. The second is the
    weight of a convolution with one output per group.
    """
    rows, columns = _count_nonzero(weight.unflatten(0, (groups, -1)), 1), _count_nonzero(weight, 1)
    return (rows, columns.unsqueeze(1)) if transposed else (columns.unsqueeze(1), rows)


def _all_pairs(x: Tensor, weight: Tensor, *settings: Any) -> int:
    """The number of pairs of a convolution, without those whose tap is outside the image."""
    image, kernel = x.new_ones(1, 1, *x.shape[2:]), x.new_ones(1, 1, *weight.shape[2:])
    taps = aten.convolution(image.double(), kernel.double(), None, *settings[:-1], 1).sum()
    return round(float(taps)) * len(x) * weight.shape[0] * weight.shape[1]


def _embedding_bag(
    operations: Operations, weight: Tensor, row_numbers: Tensor, _offsets: Tensor, *settings: Any
) -> None:
    """Weighted sums of rows: a product that skips silent inputs."""
    factors = settings[3] if len(settings) > 3 else None
    pairs = (weight != 0).sum(1)[row_numbers]
    operations.add(
        (pairs if factors is None else pairs * (factors != 0)).sum(),
        pairs.numel() * weight.shape[1],
        one_magnitude=(
            factors is None
            or operations.any_has_one_magnitude(factors)
            or has_one_magnitude(weight)
        ),
        is_error=True,
    )


# The two sides of a product, as matrices or batches of matrices, from an operation's arguments.
_SIDES: dict[Any, Callable[..., tuple[Tensor, Tensor]]] = {
    aten.mm: lambda a, b: (a, b),
    aten.addmm: lambda _, a, b: (a, b),
    aten.addmm_: lambda _, a, b: (a, b),
    aten.mv: lambda a, x: (a, x.unsqueeze(1)),
    aten.addmv: lambda _, a, x: (a, x.unsqueeze(1)),
    aten.dot: lambda a, b: (a.unsqueeze(0), b.unsqueeze(1)),
    aten.vdot: lambda a, b: (a.unsqueeze(0), b.unsqueeze(1)),
    aten.bmm: lambda a, b: (a, b),
    aten.baddbmm: lambda _, a, b: (a, b),
}
_COUNTERS: dict[Any, Callable[..., None]] = {
    **{op: functools.partial(_product, sides) for op, sides in _SIDES.items()},
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
    aten._embedding_bag: _embedding_bag,
    aten._embedding_bag_forward_only: _embedding_bag,
}

# Operations with products that cannot be inspected.
_FUSED = ("_scaled_dot_product_flash_attention_for_cpu", "mkldnn_rnn_layer", "_cudnn_rnn")
_NOT_COUNTED = {
    *flop_registry,  # operations that torch's own counter knows
    *(getattr(aten, f"{name}{suffix}") for name in _FUSED for suffix in ("", "_backward")),
    # of torch's layers in inference
    *(aten._native_multi_head_attention, aten._transformer_encoder_layer_fwd),
    *(aten.addbmm, aten._trilinear),
} - set(_COUNTERS)


_CHECKED_FIRST = 1024  # numbers of the first row that are checked before all others
_MAX_EXACT = 2**24  # the largest count that is exact in fp32


def has_one_magnitude(x_OI: Tensor) -> bool:
    """Whether the non-zero numbers of each row have one magnitude.

    The other side is then added or subtracted, and the sum is multiplied once. In a row of a single
    number there is no sum to multiply instead, so the magnitude must be 0 or 1.
    """
    if x_OI.numel() == 0:
        return True
    # The beginning of one row distinguishes real numbers from spikes without a pass over all.
    if x_OI.numel() > 2 * _CHECKED_FIRST and not has_one_magnitude(x_OI[:1, :_CHECKED_FIRST]):
        return False
    low_O1, high_O1 = x_OI.aminmax(dim=1, keepdim=True)
    magnitude_O1 = torch.maximum(high_O1, -low_O1) if x_OI.shape[1] > 1 else torch.ones_like(x_OI)
    return bool(((x_OI == magnitude_O1) | (x_OI == -magnitude_O1) | (x_OI == 0)).all())


def _count_nonzero(x: Tensor, dim: int) -> Tensor:
    """The number of non-zeros along `dim`, in float64."""
    if x.is_cuda:  # the intermediate has one byte per number, because GPU memory is short
        return (x != 0).sum(dim, dtype=torch.float64)
    # The intermediate is fp32, which torch sums several times faster on a CPU.
    ones = torch.ne(x, 0, out=torch.empty_like(x, dtype=torch.float32))
    dtype = torch.float32 if x.shape[dim] <= _MAX_EXACT else torch.float64
    return ones.sum(dim, dtype=dtype).double()
