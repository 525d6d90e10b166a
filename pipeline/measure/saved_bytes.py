"""Bytes of tensors: saved by autograd for backward, or held by training between two batches."""

import threading
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn


class SavedBytes:
    """Counts the bytes that are held for backward inside the `with` block.

        with SavedBytes(model) as saved:
            ...
        saved.peak

    `now` and `peak` are bytes of the distinct storages behind autograd's saved tensors at one
    moment. Each storage counts whole and once, however many nodes or views save it. It counts from
    the first node that saves it until the last one is freed. Backward frees the nodes,
    except those of a retained graph, which are freed later.

    Storages of `parameters` (a model, or an iterable of tensors) and their views do not count.
    Copies of a weight (autocast, standardised weights) are no parameters and count. The parameters'
    storages are looked up on entering, because an engine such as DeepSpeed moves parameters into
    flat buffers. A graph that outlives the context is still subtracted from `now` as it is freed.

    Tensors of other saved-tensor hooks are not seen. torch.utils.checkpoint with
    use_reentrant=False therefore hides what it recomputes (torch 2.13). With use_reentrant=True, or
    for a recomputation inside a Function's backward, the tensors are counted.
    """

    def __init__(self, parameters: nn.Module | Iterable[Tensor] = ()) -> None:
        self._parameters = (
            list(parameters.parameters()) if isinstance(parameters, nn.Module) else list(parameters)
        )
        # Keyed by address. Holding the storages keeps their addresses from being reused.
        self._excluded: dict[int, torch.UntypedStorage] = {}
        self._held: dict[int, list[int]] = {}  # by address: [saved tensors, bytes]
        # A lock, because autograd runs one thread per device. It is reentrant, because the garbage
        # collector may free a saved tensor while this thread saves another.
        self._lock = threading.RLock()
        self._hooks = ExitStack()
        self.now = self.peak = 0

    def __enter__(self) -> Self:
        storages = (parameter.untyped_storage() for parameter in self._parameters)
        self._excluded = {storage._cdata: storage for storage in storages}
        self._hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack))
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.close()
        self._excluded = {}

    @property
    def storages(self) -> Collection[int]:
        """Addresses (`_cdata`) of the storages that are held now."""
        return self._held.keys()

    def _pack(self, tensor: Tensor) -> "_Saved":
        storage = tensor.untyped_storage()
        key = storage._cdata  # unique while the storage is held here
        if key in self._excluded:
            return _Saved(tensor, None, 0)
        saved = _Saved(tensor, self, key)
        with self._lock:
            if key in self._held:
                self._held[key][0] += 1
            else:
                self._held[key] = [1, storage.nbytes()]
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return saved

    def _release(self, key: int) -> None:
        with self._lock:
            entry = self._held[key]
            entry[0] -= 1
            if entry[0] == 0:
                del self._held[key]
                self.now -= entry[1]


class _Saved:
    """Replaces a saved tensor in autograd's graph, and reports when autograd frees it.

    It holds a detached alias. An output that its own node saves would otherwise hold that node, and
    nothing would free the cycle.
    """

    __slots__ = ("key", "owner", "tensor", "version")

    def __init__(self, tensor: Tensor, owner: SavedBytes | None, key: int) -> None:
        self.tensor = tensor.detach()  # shares the version counter of the original
        self.version = tensor._version
        self.owner = owner
        self.key = key

    def __del__(self) -> None:
        if self.owner is not None:
            # before the storage is freed, so that its address is released before its reuse
            self.owner._release(self.key)


def _unpack(saved: _Saved) -> Tensor:
    # torch 2.13 skips its version check if hooks are set (saved_variable.cpp). A measured batch
    # must fail where a plain one does, so the check is repeated here.
    if saved.tensor._version != saved.version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace"
            f" operation: [{saved.tensor.type()} {list(saved.tensor.shape)}] is at version"
            f" {saved.tensor._version}; expected version {saved.version} instead"
        )
    return saved.tensor


@dataclass(frozen=True, kw_only=True)
class HeldBytes:
    """Bytes of distinct storages that one worker holds between two batches."""

    parameters: int
    buffers: int
    gradients: int  # of all trained parameters, while a batch is differentiated
    optimizer: int  # state such as momentum; under ZeRO, the state of this worker's share


def held_bytes(network: nn.Module, optimizer: torch.optim.Optimizer) -> HeldBytes:
    """Held bytes. Call it after the optimizer's first step, which creates its state."""
    state = (value for values in optimizer.state.values() for value in values.values())
    return HeldBytes(
        parameters=bytes_of(network.parameters()),
        buffers=bytes_of(network.buffers()),
        gradients=sum(each.nbytes for each in network.parameters() if each.requires_grad),
        optimizer=bytes_of(value for value in state if isinstance(value, Tensor)),
    )


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each storage whole and once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
