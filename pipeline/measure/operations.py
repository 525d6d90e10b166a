"""Counts the multiplications and additions of training from the multiplied values.

    with Operations(network) as counted:
        ...                                 # one batch: forward, backward and the rule's own work
    counted.work["forward"].additions

It counts products: of synapses with their inputs, of attention, of a rule's own matrices. A product
is a sum of pairs:

    y[n, o] = sum_i x[n, i] w[i, o]     one pair for each n, i, o; in a convolution, for each kernel
                                        tap inside the image

The counts come from the numbers of non-zeros along each summed index, so no intermediate is as
large as the product itself.

Each pair without a zero costs one addition. It also costs a multiplication, unless one side is
"even". A side is even if its non-zero numbers share one magnitude, as spikes do. A weight is also
even if the numbers of each output share one, as with weights of 1 bit. Even numbers are added or
subtracted. Their magnitude is multiplied once per sum or output, which is not counted. The mean of
spikes from a pool, or their sum from a shortcut, are real numbers.

Element-wise work (neurons, norms, losses) is not counted: its ratio to the products is 1 to the
fan-in. Products inside one fused torch operation, such as attention or a recurrent layer, cannot be
inspected. `not_counted` names those operations.

The purposes are "forward"; "error", the error that backward passes to the layer below; "weights",
the gradients of weights; and those in `spiking/op_scope.py`. A product in a backward is "error" if
one side is a weight (or a rule's replacement of it), or if it is one of a batch of products, as in
attention. Otherwise it is "weights".
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
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pipeline.spiking.error_feedback import FixedFeedback
from pipeline.spiking.op_scope import current_scope

aten = torch.ops.aten


@dataclass(frozen=True)
class Work:
    """Numbers of operations of some products."""

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

    Counting reads both sides of every product, and waits for each product on a GPU. Use it on
    single batches. Create it where the block begins: the storages of the weights are looked up
    then, and DeepSpeed and others move weights to flat buffers.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.work: dict[str, Work] = {}
        self.not_counted: set[str] = set()  # torch operations with products that `work` lacks
        # Keyed by address. A reference keeps the address from being reused.
        self._fixed: dict[int, StorageWeakRef] = {}
        for parameter in network.parameters():
            self._note(parameter)
        for module in network.modules():
            carrier = getattr(module, "backward_weight", None)
            if isinstance(carrier, FixedFeedback):
                self._note(carrier.matrix)
        self._given = frozenset(self._fixed)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        count = _COUNTED.get(func.overloadpacket)
        if count is None and func.has_kernel_for_dispatch_key(
            torch._C.DispatchKey.CompositeImplicitAutograd
        ):
            with self:  # inference mode dispatches operations that are composed of others
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if not self.is_paused:
            if count is not None:
                with torch.no_grad():
                    count(self, *args, **kwargs)
            elif func.overloadpacket in _OPAQUE:
                self.not_counted.add(func.overloadpacket.__name__)
        self._follow(func, (args, kwargs), result)
        return result

    def add(self, live: Tensor, dense: int, *, even: bool, hands_down: bool) -> None:
        """Count a product with `live` pairs without a zero, of `dense` pairs.

        `even`: one of its sides is even. `hands_down`: in a backward, the product computes an error
        rather than the gradient of a weight.
        """
        natural = "forward"
        if torch._C._current_autograd_node() is not None:
            natural = "error" if hands_down else "weights"
        purpose, pairs = current_scope() or natural, round(float(live))
        work = Work(0 if even else pairs, pairs, dense)
        self.work[purpose] = self.work.get(purpose, Work()) + work

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is independent of the batch.

        Such tensors are parameters, or are made only of parameters and constants.
        """
        return tensor.untyped_storage()._cdata in self._fixed

    def has_even(self, *sides: Tensor) -> bool:
        """Whether one of the sides of a product is even.

        A weight is even if each of its outputs is, along either of its first two dimensions. (If a
        weight passes the error down, each output's error is multiplied by that output's magnitude
        before the sum.)
        """
        return any(
            (
                is_even(side.flatten(1)) or is_even(side.transpose(0, 1).flatten(1))
                if self.is_weight(side)
                else is_even(side.reshape(1, -1))
            )
            for side in sides
        )

    def _note(self, weight: Tensor) -> None:
        storage = weight.untyped_storage()
        self._fixed[storage._cdata] = StorageWeakRef(storage)

    def _follow(self, func: Any, given: Any, result: Any) -> None:
        """Mark results that depend only on weights as weights.

        Examples are standardised, clipped or binarised weights, or weights in another precision.
        """
        is_fixed = all(map(self.is_weight, _tensors(given)))
        for value in _tensors(result):
            if is_fixed:
                self._note(value)
            elif func._schema.is_mutable:
                # Values of the batch were written into a constant. A parameter remains one when an
                # optimizer updates it.
                key = value.untyped_storage()._cdata
                if key not in self._given:
                    self._fixed.pop(key, None)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


# -------------------------------------------------------------------------------- torch's operators


# N samples and time steps, I inputs, O outputs, G groups; ... the positions in an image or a kernel


def _product(
    sides: Callable[..., tuple[Tensor, Tensor]], operations: Operations, *args: Any, **_: Any
) -> None:
    """The product `[N, I] [I, O]`, or a batch of such products."""
    a, b = sides(*args)
    operations.add(
        (_nonzero(a, -2) * _nonzero(b, -1)).sum(),
        a.shape[-2] * b.numel(),
        even=operations.has_even(a, b),
        hands_down=a.dim() == 3 or operations.is_weight(a) or operations.is_weight(b),
    )


def _convolution(
    operations: Operations, x: Tensor, weight: Tensor, _bias: Tensor | None, *how: Any
) -> None:
    """Any convolution `[N, I, ...] -> [N, O, ...]`, also a transposed one.

    `how` are its stride, padding, dilation, whether it is transposed, output padding and groups.
    The convolution of zeros and ones is the number of pairs without a zero at each output.
    """
    _, kernel = _summed_kernels(weight, *how)
    operations.add(
        aten.convolution(_nonzero(x, 0).unsqueeze(0), kernel, None, *how).sum(),
        _dense(x, weight, *how),
        even=operations.has_even(x, weight),
        hands_down=True,
    )


def _convolution_backward(
    operations: Operations,
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    _bias_sizes: Any,
    *how_and_wanted: Any,
) -> None:
    """Both products of the backward have the triples (output, input, weight) of the forward.

    Each product multiplies two of the three; ones stand in the place of the third.
    """
    *how, (wants_x, wants_weight, _) = how_and_wanted
    groups, dense = how[-1], _dense(x, weight, *how)
    if wants_x:
        kernel, _ = _summed_kernels(weight, *how)
        ones = kernel.new_ones(1, groups, *x.shape[2:])
        live = (_nonzero(g, 0) * aten.convolution(ones, kernel, None, *how)).sum()
        operations.add(live, dense, even=operations.has_even(g, weight), hands_down=True)
    if wants_weight:
        g_NG, x_NG = (_nonzero(each.unflatten(1, (groups, -1)), 2) for each in (g, x))
        ones = x_NG.new_ones(groups, 1, *weight.shape[2:])
        live = (g_NG * aten.convolution(x_NG, ones, None, *how)).sum()
        operations.add(live, dense, even=operations.has_even(g, x), hands_down=False)


def _summed_kernels(
    weight: Tensor, _stride: Any, _padding: Any, _dilation: Any, transposed: bool, *more: Any
) -> tuple[Tensor, Tensor]:
    """Numbers of non-zeros in a weight: over the inputs, and over the outputs of each group.

    The results are weights of convolutions with one input, and with one output, per group.
    """
    rows, columns = _nonzero(weight.unflatten(0, (more[-1], -1)), 1), _nonzero(weight, 1)
    return (rows, columns.unsqueeze(1)) if transposed else (columns.unsqueeze(1), rows)


def _dense(x: Tensor, weight: Tensor, *how: Any) -> int:
    """All pairs of a convolution, but for those with a tap outside the image."""
    *sizes, _ = how
    image, kernel = x.new_ones(1, 1, *x.shape[2:]), x.new_ones(1, 1, *weight.shape[2:])
    taps = aten.convolution(image.double(), kernel.double(), None, *sizes, 1).sum()
    return round(float(taps)) * len(x) * weight.shape[0] * weight.shape[1]


def _embedding_bag(
    operations: Operations, weight: Tensor, places: Tensor, _offsets: Tensor, *more: Any
) -> None:
    """Weighted sums of rows: a product that skips silent inputs."""
    each = more[3] if len(more) > 3 else None
    rows = (weight != 0).sum(1)[places]
    live = rows if each is None else rows * (each != 0)
    operations.add(
        live.sum(),
        rows.numel() * weight.shape[1],
        even=each is None or operations.has_even(each) or is_even(weight),
        hands_down=True,
    )


# The two sides of each product, as matrices or batches of them, from an operation's arguments.
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
_COUNTED: dict[Any, Callable[..., None]] = {
    **{op: functools.partial(_product, sides) for op, sides in _SIDES.items()},
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
    aten._embedding_bag: _embedding_bag,
    aten._embedding_bag_forward_only: _embedding_bag,
}

# Operations with products that cannot be inspected.
_FUSED = ("_scaled_dot_product_flash_attention_for_cpu", "mkldnn_rnn_layer", "_cudnn_rnn")
_OPAQUE = {
    *flop_registry,  # those that torch itself counts
    *(getattr(aten, f"{name}{more}") for name in _FUSED for more in ("", "_backward")),
    # of torch's layers in inference
    *(aten._native_multi_head_attention, aten._transformer_encoder_layer_fwd),
    *(aten.addbmm, aten._trilinear),
} - set(_COUNTED)


_HEAD = 1024  # numbers of the first row that are checked before all others
_EXACT = 2**24  # the largest count that is exact in fp32


def is_even(x_OI: Tensor) -> bool:
    """Whether the non-zero numbers of each row share one magnitude.

    Such numbers are added, and the sum is multiplied once. Rows of a single number are even only if
    it is 0 or +-1, because there is no sum to multiply instead.
    """
    if x_OI.numel() == 0:
        return True
    # The beginning of one row distinguishes real numbers from spikes without a pass over all.
    if x_OI.numel() > 2 * _HEAD and not is_even(x_OI[:1, :_HEAD]):
        return False
    low_O1, high_O1 = x_OI.aminmax(dim=1, keepdim=True)
    shared_O1 = torch.maximum(high_O1, -low_O1) if x_OI.shape[1] > 1 else torch.ones_like(x_OI)
    return bool(((x_OI == shared_O1) | (x_OI == -shared_O1) | (x_OI == 0)).all())


def _nonzero(x: Tensor, dim: int) -> Tensor:
    """The number of non-zeros along `dim`, in float64."""
    if x.is_cuda:  # the intermediate has one byte per number, because GPU memory is short
        return (x != 0).sum(dim, dtype=torch.float64)
    # The intermediate is fp32, which torch sums several times faster on a CPU.
    live = torch.ne(x, 0, out=torch.empty_like(x, dtype=torch.float32))
    return live.sum(dim, dtype=torch.float32 if x.shape[dim] <= _EXACT else torch.float64).double()
