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

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
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

    def __add__(self, other: Work) -> Work:
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


class Operations(Pausable):
    """Counts operations inside the `with` block; `work` holds them by purpose.

    Counting reads both sides of every product, and waits for each product on a GPU. Use it on
    single batches.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.work: dict[str, Work] = {}
        self.not_counted: set[str] = set()  # torch operations with products that `work` lacks
        # Keyed by address. A reference keeps the address from being reused.
        self._fixed: dict[int, StorageWeakRef] = {}
        self._given: frozenset[int] = frozenset()
        self._watch = _Watch(self)

    def __enter__(self) -> Operations:
        # Parameters are looked up here, because DeepSpeed and others move them to flat buffers.
        for parameter in self.network.parameters():
            self._note(parameter)
        for module in self.network.modules():
            carrier = getattr(module, "backward_weight", None)
            if isinstance(carrier, FixedFeedback):
                self._note(carrier.matrix)
        self._given = frozenset(self._fixed)
        self._watch.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._watch.__exit__(*exc)
        self._fixed = {}

    @property
    def total(self) -> Work:
        return sum(self.work.values(), Work())

    def add(self, pairs: Pairs, *, even: bool, hands_down: bool) -> None:
        """Count a product.

        `even`: one of its sides is even. `hands_down`: in a backward, the product computes an error
        rather than the gradient of a weight.
        """
        if self.is_paused:
            return
        natural = "forward"
        if torch._C._current_autograd_node() is not None:
            natural = "error" if hands_down else "weights"
        purpose = current_scope() or natural
        work = Work(0 if even else pairs.live, pairs.live, pairs.all)
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

    def follow(self, func: Any, given: Iterable[Any], result: Any) -> None:
        """Mark results that depend only on weights as weights.

        Examples are standardised, clipped or binarised weights, or weights in another precision.
        """
        is_fixed = all(map(self.is_weight, _tensors(given)))
        for value in _tensors([result]):
            if is_fixed:
                self._note(value)
            elif func._schema.is_mutable:
                # Values of the batch were written into a constant. A parameter remains one when an
                # optimizer updates it.
                key = value.untyped_storage()._cdata
                if key not in self._given:
                    self._fixed.pop(key, None)


class _Watch(TorchDispatchMode):
    """Receives every operation below autograd."""

    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self.operations = operations

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        count = _COUNTED.get(func.overloadpacket)
        if count is None and _is_whole(func):
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if count is None and not self.operations.is_paused and func.overloadpacket in _OPAQUE:
            self.operations.not_counted.add(func.overloadpacket.__name__)
        if count is not None:
            with torch.no_grad():
                count(self.operations, *args, **kwargs)
        self.operations.follow(func, [*args, *kwargs.values()], result)
        return result


@functools.cache
def _is_whole(func: Any) -> bool:
    """Whether an operation is composed of others. In inference mode torch dispatches it as one."""
    return func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results, single or in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


# -------------------------------------------------------------------------------- torch's operators


def _product(
    sides: Callable[..., tuple[Tensor, Tensor]], operations: Operations, *args: Any, **_: Any
) -> None:
    a, b = sides(*args)
    is_batch = a.dim() == 3
    operations.add(
        batches(a, b) if is_batch else matrices(a, b),
        even=operations.has_even(a, b),
        hands_down=is_batch or operations.is_weight(a) or operations.is_weight(b),
    )


def _convolution(
    operations: Operations, x: Tensor, weight: Tensor, _bias: Tensor | None, *how: Any
) -> None:
    convolution, is_transposed = _geometry(weight, *how)
    sizes = zip(x.shape[2:], *_each_dimension(weight, *how), strict=True)
    if is_transposed:
        size = tuple(
            (n - 1) * move - 2 * pad + step * (taps - 1) + more + 1
            for n, taps, move, pad, step, more in sizes
        )
        pairs = convolution.error(x, weight, size)
    else:
        places = tuple(
            (n + 2 * pad - step * (taps - 1) - 1) // move + 1
            for n, taps, move, pad, step, _ in sizes
        )
        pairs = convolution.forward(x, weight, places)
    operations.add(pairs, even=operations.has_even(x, weight), hands_down=True)


def _convolution_backward(
    operations: Operations,
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    _bias_sizes: Any,
    *how_and_wanted: Any,
) -> None:
    *how, (wants_x, wants_weight, _) = how_and_wanted
    convolution, is_transposed = _geometry(weight, *how)
    size = tuple(x.shape[2:])
    if wants_x:
        pairs = (
            convolution.forward(g, weight, size)
            if is_transposed
            else convolution.error(g, weight, size)
        )
        operations.add(pairs, even=operations.has_even(g, weight), hands_down=True)
    if wants_weight:
        pairs = convolution.weights(x, g) if is_transposed else convolution.weights(g, x)
        operations.add(pairs, even=operations.has_even(g, x), hands_down=False)


def _geometry(
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    _: Any,
    groups: int,
) -> tuple[Convolution, bool]:
    """The convolution; for a transposed one, the convolution whose error it computes."""
    return Convolution(tuple(weight.shape[2:]), stride, padding, dilation, groups), transposed


def _each_dimension(
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    _: Any,
    output_padding: list[int],
    __: int,
) -> tuple[Any, ...]:
    return tuple(weight.shape[2:]), stride, padding, dilation, output_padding


def _embedding_bag(
    operations: Operations, weight: Tensor, places: Tensor, _offsets: Tensor, *more: Any
) -> None:
    """Weighted sums of rows: a product that skips silent inputs."""
    each = more[3] if len(more) > 3 else None
    rows = (weight != 0).sum(1)[places]
    live = rows if each is None else rows * (each != 0)
    even = each is None or operations.has_even(each) or is_even(weight)
    pairs = Pairs(int(live.sum()), rows.numel() * weight.shape[1])
    operations.add(pairs, even=even, hands_down=True)


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


# N samples and time steps, I inputs, O outputs, P positions in an image, h w kernel taps


_HEAD = 1024  # numbers of the first row that are checked before all others
_EXACT = 2**24  # the largest count that is exact in fp32


class Pairs(NamedTuple):
    """The pairs of one product."""

    live: int  # pairs without a zero
    all: int


def matrices(a_NI: Tensor, b_IO: Tensor) -> Pairs:
    """Pairs of the product a b."""
    live = _nonzero(a_NI, 0) @ _nonzero(b_IO, 1)
    return Pairs(int(live), a_NI.shape[0] * b_IO.numel())


def batches(a_BNI: Tensor, b_BIO: Tensor) -> Pairs:
    """Pairs of a batch of products a b."""
    live = (_nonzero(a_BNI, 1) * _nonzero(b_BIO, 2)).sum()
    return Pairs(int(live), a_BNI.shape[1] * b_BIO.numel())


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
    if x_OI.shape[1] > 1:
        low_O1, high_O1 = x_OI.aminmax(dim=1, keepdim=True)
        shared_O1 = torch.maximum(high_O1, -low_O1)
    else:
        shared_O1 = torch.ones_like(x_OI)
    return bool(((x_OI == shared_O1) | (x_OI == -shared_O1) | (x_OI == 0)).all())


@dataclass(frozen=True)
class Convolution:
    """A zero-padded convolution `[N, I, ...] -> [N, O, ...]`, and both products of its backward."""

    kernel: tuple[int, ...]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, places: tuple[int, ...]) -> Pairs:
        """Pairs of inputs and weights, at each of the `places` of the output."""
        read_Ihw = self._under_taps(_nonzero(x, 0), places).sum(self._dims(1))
        weights_GIhw = _nonzero(weight.unflatten(0, (self.groups, -1)), 1)  # outputs of a group
        live = (read_Ihw * weights_GIhw.flatten(0, 1)).sum()
        of_a_place = len(x) * weight.shape[0] * weight.shape[1]
        return Pairs(int(live), of_a_place * self._inside(tuple(x.shape[2:]), places))

    def error(self, g: Tensor, weight: Tensor, size: tuple[int, ...]) -> Pairs:
        """Pairs of output errors and weights, at each position of an input of `size` pixels.

        They are also the pairs of the forward of a transposed convolution.
        """
        places = tuple(g.shape[2:])
        reach_Phw = self._under_taps(torch.ones(size, dtype=torch.float64, device=g.device), places)
        reached_Ohw = torch.tensordot(_nonzero(g, 0), reach_Phw, dims=len(size))
        live = (reached_Ohw * _nonzero(weight, 1)).sum()  # inputs of a group
        of_a_place = len(g) * weight.shape[0] * weight.shape[1]
        return Pairs(int(live), of_a_place * self._inside(size, places))

    def weights(self, g: Tensor, x: Tensor) -> Pairs:
        """Pairs of output errors and inputs, for each weight."""
        places = tuple(g.shape[2:])
        errors_NGP, inputs_NG = (
            _nonzero(each.unflatten(1, (self.groups, -1)), 2) for each in (g, x)
        )
        read_NGP = self._under_taps(inputs_NG, places).sum(self._dims(2 + len(places)))
        live = (read_NGP * errors_NGP).sum()
        of_a_place = len(g) * g.shape[1] * (x.shape[1] // self.groups)
        return Pairs(int(live), of_a_place * self._inside(tuple(x.shape[2:]), places))

    def _inside(self, size: tuple[int, ...], places: tuple[int, ...]) -> int:
        """Taps inside the image, summed over `places`: the product over the dimensions."""
        inside = 1
        for taps, n, count, move, pad, step in zip(
            self.kernel, size, places, self.stride, self.padding, self.dilation, strict=True
        ):
            inside *= sum(
                0 <= place * move + tap * step - pad < n
                for tap in range(taps)
                for place in range(count)
            )
        return inside

    def _under_taps(self, x: Tensor, places: tuple[int, ...]) -> Tensor:
        """The values that each tap reads at each output position, with 0 in the padding.

        The result `[..., P..., h w ...]` is a view of the padded image.
        """
        found = F.pad(x, [side for pad in reversed(self.padding) for side in (pad, pad)])
        by_dim = zip(places, self.kernel, self.stride, self.dilation, strict=True)
        for dim, (count, taps, move, step) in enumerate(by_dim, start=x.dim() - len(places)):
            windows = found.unfold(dim, step * (taps - 1) + 1, move)
            found = windows.narrow(dim, 0, count)[..., ::step]
        return found

    def _dims(self, first: int) -> tuple[int, ...]:
        return tuple(range(first, first + len(self.kernel)))


def _nonzero(x: Tensor, dim: int) -> Tensor:
    """The number of non-zeros along `dim`, in float64."""
    if x.is_cuda:  # the intermediate has one byte per number, because GPU memory is short
        return (x != 0).sum(dim, dtype=torch.float64)
    # The intermediate is fp32, which torch sums several times faster on a CPU.
    live = torch.ne(x, 0, out=torch.empty_like(x, dtype=torch.float32))
    return live.sum(dim, dtype=torch.float32 if x.shape[dim] <= _EXACT else torch.float64).double()
