"""Counts the multiplications and additions of training, from the numbers that are really
multiplied.

    with Operations(network) as counted: ...        # one batch: forward, backward, whatever the
    rule does beside them counted.work["forward"].additions

Counted are products: of synapses with what reaches them, of attention, of a rule's own matrices. A
product is a sum of pairs (`measure/pairs.py`) and costs one addition for each pair of which neither
number is 0. It costs a multiplication as well unless one of the two is even: all its numbers are 0
or of one magnitude, such as spikes, or those of each output of a weight are, such as one of 1 bit.
Even numbers are added or subtracted, and their magnitude is multiplied once for a sum or an output,
which is not counted. Spikes of which a pool took the mean, or a shortcut the sum, are real numbers.

What is done element by element (neurons, norms, losses) is not counted: it is to the products as 1
to the fan-in. Products that torch makes inside one operation, of attention or of a recurrent layer,
cannot be looked into; `not_counted` names those.

Purposes: "forward"; "error", what the backward hands down; "weights", the gradients of weights; and
what `spiking/op_scope.py` names. A product in a backward is "error" where one side is a weight (or
what a rule puts in its place), or where it is one of a batch of products, as attention's are; else
"weights".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pipeline.measure.pairs import Convolution, Pairs, batches, is_even, matrices
from pipeline.measure.traffic import Pausable
from pipeline.spiking.feedback_alignment import FixedFeedback
from pipeline.spiking.op_scope import served

aten = torch.ops.aten


@dataclass(frozen=True)
class Work:
    """What some products cost, in numbers of operations."""

    multiplications: int = 0
    additions: int = 0
    dense: int = 0
    """pairs, those with a 0 among them: what a network without spikes multiplies"""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.multiplications + other.multiplications,
            self.additions + other.additions,
            self.dense + other.dense,
        )


class Operations(Pausable):
    """Counts while it is entered; `work` says what was done for each purpose.

    Counting passes over both sides of every product, and on a GPU waits for each: it is for single
    batches.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.work: dict[str, Work] = {}
        self.not_counted: set[str] = set()
        """operations of torch that make products, and are in none of `work`"""
        self._fixed: dict[
            int, StorageWeakRef
        ] = {}  # values: while one is there, no other storage gets the key
        self._given: frozenset[int] = frozenset()
        self._watch = _Watch(self)

    def __enter__(self) -> Operations:
        for parameter in (
            self.network.parameters()
        ):  # now: an engine such as DeepSpeed moves them into flat buffers
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
        """A product; `even`: one of its sides is; `hands_down`: in a backward it makes an error,
        not a weight's gradient.
        """
        if self.is_paused:
            return
        natural = "forward"
        if torch._C._current_autograd_node() is not None:
            natural = "error" if hands_down else "weights"
        purpose = served() or natural
        work = Work(0 if even else pairs.live, pairs.live, pairs.all)
        self.work[purpose] = self.work.get(purpose, Work()) + work

    # ----------------------------------------------------------------------------------- who is who

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether it does not depend on the batch: a parameter, or what was made of parameters and
        constants alone.
        """
        return tensor.untyped_storage()._cdata in self._fixed

    def is_even(self, tensor: Tensor) -> bool:
        """Whether the whole has one magnitude; or, of a weight, each of its outputs, which may lie
        along either of its sides.

        (Where a weight hands the error down, what is multiplied by an output's magnitude is its
        error, before the sum.)"""
        if not self.is_weight(tensor):
            return is_even(tensor.reshape(1, -1))
        return is_even(tensor.flatten(1)) or is_even(tensor.transpose(0, 1).flatten(1))

    def _note(self, weight: Tensor) -> None:
        storage = weight.untyped_storage()
        self._fixed[storage._cdata] = StorageWeakRef(storage)

    def follow(self, func: Any, given: Iterable[Any], result: Any) -> None:
        """What comes of weights alone is a weight, too: standardised, limited, of one bit, or in
        another precision.
        """
        is_fixed = all(map(self.is_weight, _tensors(given)))
        for value in _tensors([result]):
            if is_fixed:
                self._note(value)
            elif func._schema.is_mutable:  # the batch was written into what was a constant
                self._forget(value)

    def _forget(self, tensor: Tensor) -> None:
        key = tensor.untyped_storage()._cdata
        if key not in self._given:  # a parameter stays one when an optimizer moves it
            self._fixed.pop(key, None)


class _Watch(TorchDispatchMode):
    """Sees every operation below autograd."""

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
    """Whether it is made of others, products among them: in inference mode torch hands it over
    whole.
    """
    return func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those that an operation was given, or gave: alone or in lists, and in nothing else."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


# ---------------------------------------------------------------------------- what torch calls them


def _mm(operations: Operations, a: Tensor, b: Tensor, **_: Any) -> None:
    hands_down = operations.is_weight(a) or operations.is_weight(b)
    operations.add(
        matrices(a, b), even=operations.is_even(a) or operations.is_even(b), hands_down=hands_down
    )


def _addmm(operations: Operations, _bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> None:
    _mm(operations, a, b)


def _mv(operations: Operations, a: Tensor, x: Tensor) -> None:
    _mm(operations, a, x.unsqueeze(1))


def _addmv(operations: Operations, _bias: Tensor, a: Tensor, x: Tensor, **_: Any) -> None:
    _mv(operations, a, x)


def _dot(operations: Operations, a: Tensor, b: Tensor) -> None:
    _mm(operations, a.unsqueeze(0), b.unsqueeze(1))


def _bmm(operations: Operations, a: Tensor, b: Tensor, **_: Any) -> None:
    operations.add(
        batches(a, b), even=operations.is_even(a) or operations.is_even(b), hands_down=True
    )


def _baddbmm(operations: Operations, _bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> None:
    _bmm(operations, a, b)


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
    operations.add(pairs, even=operations.is_even(x) or operations.is_even(weight), hands_down=True)


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
        operations.add(
            pairs, even=operations.is_even(g) or operations.is_even(weight), hands_down=True
        )
    if wants_weight:
        pairs = convolution.weights(x, g) if is_transposed else convolution.weights(g, x)
        operations.add(pairs, even=operations.is_even(g) or operations.is_even(x), hands_down=False)


def _geometry(
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    _: Any,
    groups: int,
) -> tuple[Convolution, bool]:
    """The convolution, or, where it is transposed, the one whose error it hands down."""
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
    """Sums of rows, each times a number of its own: a product with nothing but what was emitted."""
    each = more[3] if len(more) > 3 else None
    rows = (weight != 0).sum(1)[places]
    live = rows if each is None else rows * (each != 0)
    even = each is None or operations.is_even(each) or is_even(weight)
    operations.add(
        Pairs(int(live.sum()), rows.numel() * weight.shape[1]), even=even, hands_down=True
    )


_COUNTED: dict[Any, Callable[..., None]] = {
    aten.mm: _mm,
    aten.addmm: _addmm,
    aten.addmm_: _addmm,
    aten.mv: _mv,
    aten.addmv: _addmv,
    aten.dot: _dot,
    aten.vdot: _dot,
    aten.bmm: _bmm,
    aten.baddbmm: _baddbmm,
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
    aten._embedding_bag: _embedding_bag,
    aten._embedding_bag_forward_only: _embedding_bag,
}

_OPAQUE = frozenset(
    {
        *flop_registry,  # what torch itself would count
        *(
            getattr(aten, f"_scaled_dot_product_flash_attention_for_cpu{more}")
            for more in ("", "_backward")
        ),
        *(
            getattr(aten, f"{name}{more}")
            for name in ("mkldnn_rnn_layer", "_cudnn_rnn")
            for more in ("", "_backward")
        ),
        *(
            aten._native_multi_head_attention,
            aten._transformer_encoder_layer_fwd,
        ),  # of torch's layers, where nothing is learnt
        *(aten.addbmm, aten._trilinear),
    }
) - frozenset(_COUNTED)
"""that make products, and are handed over whole"""
