"""An independent count of the bytes that autograd keeps: distinct storages alive at one moment,
each whole and once.
"""

import weakref
from collections import Counter

import torch
from torch import Tensor, nn


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """`peak` after the block: the most bytes held at one moment, the parameters of `model`
    apart.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.peak = 0
        self._parameters = (
            {p.untyped_storage().data_ptr() for p in model.parameters()} if model else set()
        )
        self._holders: Counter[tuple[int, int]] = Counter()
        super().__init__(self._pack, lambda kept: kept.tensor)

    def __enter__(self) -> "SavedBytes":  # type: ignore[override]  # torch's own returns None
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> _Kept:
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        key = (storage.data_ptr(), storage.nbytes())
        if key[0] not in self._parameters:
            self._holders[key] += 1
            weakref.finalize(kept, self._drop, key)
            self.peak = max(
                self.peak, sum(size for (_, size), holders in self._holders.items() if holders)
            )
        return kept

    def _drop(self, key: tuple[int, int]) -> None:
        self._holders[key] -= 1
